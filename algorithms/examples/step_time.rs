//! How long one microbatch takes on this machine: forward, loss and backward, block by block as the
//! trainer does it, without optimiser and reduction.
//!
//! `RAYON_NUM_THREADS=1 cargo run --release -p algorithms --example step_time -- [gpt|digits|fashion]`

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use algorithms::{
    BlockInput, LocalChannels, Microbatch, Mode, Model, Problem, StepKey, algorithm,
    initial_values, tensor_from_slice,
};
use api::JobSpec;
use burn::tensor::{Device, Tensor};

/// Time spent on each case after one microbatch of warm-up.
const BUDGET: Duration = Duration::from_secs(5);

/// Opens data and model as a job would.
fn open(name: &str, settings: &str, data: &Path) -> Result<Problem, Box<dyn Error>> {
    let uri = data.display();
    let text = format!(
        "name = \"bench\"\nalgorithm = \"{name}\"\n[channels]\ntrain = {{ uri = \"file://{uri}\" }}\n\
         [stop]\nmax_steps = 1\n[hyperparameters]\n{settings}"
    );
    let algorithm = algorithm(name)?;
    let mut spec = JobSpec::parse(&text, "bench", Path::new("."), &[])?;
    spec.resolve(&algorithm.schema())?;
    let channels = LocalChannels::from([("train".to_owned(), data.to_owned())]);
    Ok(algorithm.open(&spec, &channels)?)
}

fn parameters(model: &Model) -> Vec<Vec<Tensor<1>>> {
    let device = Device::flex().autodiff();
    let leaf = |spec| {
        let spec: &algorithms::ParamSpec = spec;
        let mut values = vec![0.0; spec.len()];
        initial_values(1, spec, &mut values);
        tensor_from_slice(&values, &device).require_grad()
    };
    model.blocks.iter().map(|block| block.params().iter().map(leaf).collect()).collect()
}

/// One microbatch; adds each block's forward and backward time to `times`.
fn step(
    model: &Model,
    params: &[Vec<Tensor<1>>],
    batch: Microbatch,
    times: &mut [[f64; 2]],
) -> f32 {
    let mode = Mode::Train(StepKey { seed: 1, step: 0, microbatch: 0 });
    let mut input = batch.input;
    let mut tape = Vec::new();
    for (index, block) in model.blocks.iter().enumerate() {
        let start = Instant::now();
        let leaf = match &input {
            BlockInput::Features(x) if index > 0 => Some(x.clone()),
            _ => None,
        };
        let output = block.forward(&params[index], input, mode);
        input = BlockInput::Features(output.clone().inner().autodiff().require_grad());
        tape.push((leaf, output));
        times[index][0] += start.elapsed().as_secs_f64();
    }
    let BlockInput::Features(output) = input else { return f32::NAN };
    let start = Instant::now();
    let loss = (model.loss)(output.clone(), &batch.targets, true).sum;
    let mut gradients = loss.backward();
    let mut seed = output.grad_remove(&mut gradients);
    times[model.blocks.len()][0] += start.elapsed().as_secs_f64();
    for (index, (leaf, output)) in tape.into_iter().enumerate().rev() {
        let start = Instant::now();
        let Some(gradient) = seed.take() else { break };
        let mut gradients = (output * gradient.autodiff()).sum().backward();
        for param in &params[index] {
            drop(param.grad_remove(&mut gradients));
        }
        seed = leaf.and_then(|leaf| leaf.grad_remove(&mut gradients));
        times[index][1] += start.elapsed().as_secs_f64();
    }
    loss.into_scalar::<f32>()
}

fn measure(problem: &Problem, samples: u64) -> Result<(), Box<dyn Error>> {
    let model = &problem.model;
    let params = parameters(model);
    let indices: Vec<u64> = (0..samples).collect();
    let batch = problem.train.microbatch(&indices, None, &Device::flex())?;
    let mut times = vec![[0.0; 2]; model.blocks.len() + 1];
    step(model, &params, batch.clone(), &mut times);
    times.fill([0.0; 2]);
    let (start, mut steps) = (Instant::now(), 0u32);
    while start.elapsed() < BUDGET {
        step(model, &params, batch.clone(), &mut times);
        steps += 1;
    }
    let each = start.elapsed().as_secs_f64() / f64::from(steps);
    let units = if batch.tokens > 0 { (batch.tokens, "tokens") } else { (samples, "images") };
    println!("{:.2} ms, {:.0} {}/s", each * 1e3, units.0 as f64 / each, units.1);
    let names = model.blocks.iter().map(|block| block.name()).chain(["loss"]);
    for (name, [forward, backward]) in names.zip(times) {
        let ms = |seconds: f64| seconds * 1e3 / f64::from(steps);
        println!("  {name:<14} forward {:7.3} ms, backward {:7.3} ms", ms(forward), ms(backward));
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let only = std::env::args().nth(1);
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    if wanted("gpt") {
        let folder = tempfile::tempdir()?;
        let text = folder.path().join("text.txt");
        std::fs::write(&text, include_str!("step_time.rs").repeat(4))?;
        print!("gpt (6 layers, width 384, 6 heads, sequence 128, bytes), microbatch 8: ");
        let settings = "layers = 6\nwidth = 384\nheads = 6\nsequence_length = 128\n";
        measure(&open("transformer", settings, &text)?, 8)?;
    }
    if wanted("digits") {
        let data = here.join("../examples/digits/train.csv.gz");
        print!("8x8 images, default network, microbatch 8: ");
        measure(&open("image-classification", "", &data)?, 8)?;
    }
    let data = Path::new("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz");
    if wanted("fashion") && data.exists() {
        for samples in [8, 16] {
            print!("28x28 images, default network, microbatch {samples}: ");
            measure(&open("image-classification", "", data)?, samples)?;
        }
    }
    Ok(())
}
