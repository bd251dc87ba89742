//! The default image network learns real images. A plain AdamW stands in for the trainer, so that a
//! failure here is the model's or its data's.

use std::path::Path;

use algorithms::{
    BlockInput, Dataset, LocalChannels, Mode, Model, Problem, StepKey, algorithm, initial_values,
    model_params, tensor_from_slice, tensor_into_vec,
};
use api::JobSpec;
use burn::tensor::{Device, Tensor};

const BATCH: u64 = 64;

fn open(train: &Path, validation: &Path, settings: &str) -> Problem {
    let text = format!(
        "name = \"learning\"\nalgorithm = \"image-classification\"\n\
         [channels]\ntrain = {{ uri = \"file://{}\" }}\nvalidation = {{ uri = \"file://{}\" }}\n\
         [stop]\nmax_steps = 1\n[hyperparameters]\n{settings}",
        train.display(),
        validation.display()
    );
    let algorithm = algorithm("image-classification").expect("known");
    let mut spec = JobSpec::parse(&text, "test", Path::new("/"), &[]).expect("a job");
    spec.resolve(&algorithm.schema()).expect("legal");
    let channels = LocalChannels::from([
        ("train".to_owned(), train.to_owned()),
        ("validation".to_owned(), validation.to_owned()),
    ]);
    algorithm.open(&spec, &channels).expect("opens")
}

/// Weights with AdamW's two running means, one vector each per parameter.
struct Adam {
    values: Vec<[Vec<f32>; 3]>,
    decay: Vec<bool>,
    steps: i32,
}

impl Adam {
    fn new(model: &Model) -> Self {
        let params = model_params(model);
        let state = |spec: &algorithms::ParamSpec| {
            let mut values = vec![0.0; spec.len()];
            initial_values(1, spec, &mut values);
            [values, vec![0.0; spec.len()], vec![0.0; spec.len()]]
        };
        Self {
            values: params.iter().map(|(_, spec)| state(spec)).collect(),
            decay: params.iter().map(|(_, spec)| spec.decay).collect(),
            steps: 0,
        }
    }

    fn leaves(&self, model: &Model, device: &Device) -> Vec<Vec<Tensor<1>>> {
        let mut flat = self.values.iter();
        let mut leaf = |_| {
            let values = &flat.next().expect("one state per parameter")[0];
            let tensor = tensor_from_slice(values, device);
            if device.is_autodiff() { tensor.require_grad() } else { tensor }
        };
        model
            .blocks
            .iter()
            .map(|block| (0..block.params().len()).map(&mut leaf).collect())
            .collect()
    }

    fn update(&mut self, gradients: Vec<Vec<f32>>, rate: f32) {
        self.steps += 1;
        let (first, second) = (1.0 - 0.9f32.powi(self.steps), 1.0 - 0.99f32.powi(self.steps));
        for (([w, m, v], gradient), &decay) in
            self.values.iter_mut().zip(gradients).zip(&self.decay)
        {
            for (i, g) in gradient.into_iter().enumerate() {
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.99 * v[i] + 0.01 * g * g;
                let shrink = if decay { 0.01 * w[i] } else { 0.0 };
                w[i] -= rate * (m[i] / first / ((v[i] / second).sqrt() + 1e-8) + shrink);
            }
        }
    }
}

fn run(model: &Model, params: &[Vec<Tensor<1>>], mut input: BlockInput, mode: Mode) -> Tensor<2> {
    for (block, params) in model.blocks.iter().zip(params) {
        input = BlockInput::Features(block.forward(params, input, mode));
    }
    let BlockInput::Features(output) = input else { panic!("the last block gives features") };
    output
}

fn accuracy(model: &Model, adam: &Adam, data: &dyn Dataset) -> f64 {
    let device = Device::flex();
    let params = adam.leaves(model, &device);
    let indices: Vec<u64> = (0..data.len()).collect();
    let mut right = 0.0;
    for indices in indices.chunks(BATCH as usize) {
        let batch = data.microbatch(indices, None, &device).expect("in range");
        let output = run(model, &params, batch.input, Mode::Evaluate);
        right += (model.loss)(output, &batch.targets, true).sums[0];
    }
    right / data.len() as f64
}

/// Trains for some epochs with a linearly falling rate; the validation accuracy at the end.
fn train(problem: &Problem, epochs: u64, rate: f32) -> f64 {
    let model = &problem.model;
    let mut adam = Adam::new(model);
    let device = Device::flex().autodiff();
    let samples = problem.train.len();
    let total = samples * epochs / BATCH;
    for step in 0..total {
        // A full cycle through the samples in a scattered order: the stride is a large prime.
        let index = |i: u64| (step * BATCH + i) * 999_983 % samples;
        let indices: Vec<u64> = (0..BATCH).map(index).collect();
        let key = StepKey { seed: 1, step, microbatch: 0 };
        let batch =
            problem.train.microbatch(&indices, Some(key), &Device::flex()).expect("in range");
        let params = adam.leaves(model, &device);
        let output = run(model, &params, batch.input, Mode::Train(key));
        let mut gradients = (model.loss)(output, &batch.targets, false).sum.backward();
        let mean = |gradient: Tensor<1>| {
            tensor_into_vec(gradient).into_iter().map(|g| g / BATCH as f32).collect()
        };
        let gradients = params
            .iter()
            .flatten()
            .map(|leaf| mean(leaf.grad_remove(&mut gradients).expect("a gradient")))
            .collect();
        adam.update(gradients, rate * (1.05 - step as f32 / total as f32));
    }
    let validation = problem.validation.as_deref().expect("given");
    accuracy(model, &adam, validation)
}

#[test]
fn the_default_network_reads_digits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/digits");
    let problem = open(&folder.join("train.csv.gz"), &folder.join("validation.csv.gz"), "");
    let accuracy = train(&problem, 12, 0.005);
    println!("validation accuracy {accuracy:.4}");
    assert!(accuracy >= 0.97, "{accuracy}, expected at least 0.97");
}

/// Needs Debian's `dataset-fashion-mnist` and some minutes.
#[test]
#[ignore = "minutes long; run by name"]
fn the_default_network_tells_clothes_apart() {
    let folder = Path::new("/usr/share/datasets/fashion-mnist");
    let problem = open(
        &folder.join("train-images-idx3-ubyte.gz"),
        &folder.join("t10k-images-idx3-ubyte.gz"),
        "",
    );
    let accuracy = train(&problem, 3, 0.005);
    println!("validation accuracy {accuracy:.4}");
    assert!(accuracy >= 0.89, "{accuracy}, expected at least 0.89");
}
