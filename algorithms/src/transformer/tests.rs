//! The language model as a whole.

use std::ops::ControlFlow;

use burn::tensor::{Device, Int, Tensor};

use super::Transformer;
use super::architecture::Architecture;
use super::decoder::Decoder;
use crate::algorithm::{
    Algorithm, GenerateInput, ImageInput, ModelDescriptor, Predictor, Request, Response,
};
use crate::block::{BlockInput, Mode, StepKey, Targets};
use crate::tensor::{tensor_from_slice, tensor_into_vec};
use crate::testing::{
    Descent, TRAIN, Values, blockwise, check_gradients, descend, initial, loss, perturbed,
    safetensors,
};

const TINY: Architecture =
    Architecture { layers: 2, width: 12, heads: 3, sequence_length: 6, vocabulary: 11 };

/// A sequence that repeats, so that there is something to learn.
fn microbatch(architecture: Architecture, batch: usize) -> (BlockInput, Targets) {
    let Architecture { sequence_length, vocabulary, .. } = architecture;
    let device = Device::flex();
    let text: Vec<i64> =
        (0..=batch * sequence_length).map(|i| ((i * i / 3 + i) % 7 % vocabulary) as i64).collect();
    let count = batch * sequence_length;
    let tokens = Tensor::<1, Int>::from_ints(&text[..count], &device);
    let targets = Tensor::<1, Int>::from_ints(&text[1..=count], &device);
    (BlockInput::Tokens(tokens.reshape([batch, sequence_length])), Targets::Classes(targets))
}

#[test]
fn a_fresh_model_knows_nothing() {
    let architecture =
        Architecture { layers: 3, width: 32, heads: 4, sequence_length: 16, vocabulary: 256 };
    let model = architecture.model(0.0);
    let (input, targets) = microbatch(architecture, 4);
    let sum = loss(&model, &initial(&model, 1), &input, &targets, Mode::Evaluate);
    let per_token = sum / 64.0;
    assert!((per_token - 256f64.ln()).abs() < 0.1, "{per_token}, expected ln 256 = 5.545");
}

#[test]
fn shapes_and_names_are_what_checkpoints_hold() {
    let model = TINY.model(0.0);
    let names: Vec<String> = crate::registry::model_params(&model)
        .into_iter()
        .map(|(block, spec)| format!("{block} {} {:?} {}", spec.name, spec.shape, spec.decay))
        .collect();
    assert_eq!(names[0], "0 embedding.tokens.weight [11, 12] false");
    assert_eq!(names[1], "0 embedding.positions.weight [6, 12] false");
    assert_eq!(names[4], "1 layers.0.attention.qkv.weight [12, 36] true");
    assert_eq!(names[14], "2 layers.1.attention.norm.weight [12] false");
    assert_eq!(names.last().map(String::as_str), Some("3 head.output.weight [12, 11] true"));
    assert_eq!(names.len(), 2 + 2 * 12 + 3);
}

#[test]
fn gradients_are_right_through_blocks() {
    let model = TINY.model(0.0);
    let (input, targets) = microbatch(TINY, 2);
    check_gradients(&model, &perturbed(&model, 0.2), &input, &targets, (1e-2, 2e-2, 0.05));
}

#[test]
fn gradients_are_right_under_dropout() {
    let model = TINY.model(0.3);
    let (input, targets) = microbatch(TINY, 2);
    let values = perturbed(&model, 0.2);
    check_gradients(&model, &values, &input, &targets, (1e-2, 2e-2, 0.05));
    let other = Mode::Train(StepKey { seed: 3, step: 1, microbatch: 3 });
    let at = |mode| loss(&model, &values, &input, &targets, mode);
    assert_eq!(at(TRAIN), at(TRAIN));
    assert_ne!(at(TRAIN), at(other));
    assert_eq!(at(Mode::Evaluate), at(Mode::Evaluate));
    assert_ne!(at(TRAIN), at(Mode::Evaluate));
}

#[test]
fn a_microbatch_gives_the_same_bits_every_time() {
    let model = TINY.model(0.1);
    let (input, targets) = microbatch(TINY, 3);
    let values = perturbed(&model, 0.1);
    let first = blockwise(&model, &values, &input, &targets, TRAIN);
    assert_eq!(first, blockwise(&model, &values, &input, &targets, TRAIN));
}

#[test]
fn thirty_steps_of_plain_descent_lower_the_loss() {
    let model = TINY.model(0.0);
    let (input, targets) = microbatch(TINY, 8);
    let Descent { before, after, .. } = descend(&model, (&input, &targets), 0.5, 30, false);
    assert!(after < before - 0.2, "{before} to {after}");
}

#[test]
fn the_kept_context_gives_the_logits_of_the_whole_window() {
    let model = TINY.model(0.0);
    let values = perturbed(&model, 0.3);
    let device = Device::flex();
    let params = |values: &Values| -> Vec<Vec<Tensor<1>>> {
        let tensors =
            |block: &Vec<Vec<f32>>| block.iter().map(|v| tensor_from_slice(v, &device)).collect();
        values.iter().map(tensors).collect()
    };
    let tokens: [u32; 6] = [3, 1, 4, 1, 5, 9];
    let mut x = BlockInput::Tokens(
        Tensor::<1, Int>::from_ints(tokens.map(i64::from), &device).reshape([1, 6]),
    );
    for (block, params) in model.blocks.iter().zip(params(&values)) {
        x = BlockInput::Features(block.forward(&params, x, Mode::Evaluate));
    }
    let BlockInput::Features(output) = x else { panic!("features") };
    let whole = tensor_into_vec(output);
    let mut decoder = Decoder::new(TINY, params(&values), &device);
    for pieces in [&[6][..], &[1, 1, 1, 1, 1, 1], &[2, 3, 1]] {
        decoder.clear();
        let mut read = 0;
        for &piece in pieces {
            let logits = decoder.read(&tokens[read..read + piece]);
            read += piece;
            for (a, b) in logits.iter().zip(&whole[(read - 1) * 11..read * 11]) {
                assert!((a - b).abs() < 1e-4, "after {read} of {pieces:?}: {a}, expected {b}");
            }
        }
        assert_eq!(decoder.room(), 0);
    }
}

/// A byte-level model that has learned to repeat `text`.
fn trained(text: &str) -> (ModelDescriptor, Vec<u8>) {
    let architecture =
        Architecture { layers: 1, width: 32, heads: 2, sequence_length: 8, vocabulary: 256 };
    let model = architecture.model(0.0);
    let device = Device::flex();
    // Every place of the text at every position of the window.
    let bytes: Vec<i64> = text.bytes().cycle().take(text.len() + 8).map(i64::from).collect();
    let rows = |from: usize| -> Vec<i64> {
        bytes[from..].windows(8).take(text.len()).flatten().copied().collect()
    };
    let tokens = Tensor::<1, Int>::from_ints(rows(0).as_slice(), &device).reshape([text.len(), 8]);
    let targets = Tensor::<1, Int>::from_ints(rows(1).as_slice(), &device);
    let pair = (&BlockInput::Tokens(tokens), &Targets::Classes(targets));
    let Descent { after, values, .. } = descend(&model, pair, 0.01, 120, true);
    assert!(after < 0.5, "the model has not learned its text: loss {after}");
    let descriptor = ModelDescriptor {
        algorithm: "transformer".into(),
        version: 1,
        parameters: serde_json::json!({"architecture": architecture}),
    };
    (descriptor, safetensors(&model, &values))
}

fn request(prompt: &str, temperature: f32, max_tokens: u32) -> GenerateInput {
    GenerateInput { prompt: prompt.into(), max_tokens, temperature, top_k: None, seed: 4 }
}

fn predictor(descriptor: &ModelDescriptor, weights: &[u8]) -> Box<dyn Predictor> {
    Transformer.predictor(descriptor, weights, &Device::flex()).expect("loads")
}

#[test]
fn a_served_model_says_what_it_learned_and_streams_it() {
    let (descriptor, weights) = trained("héjk wörd ");
    let mut model = predictor(&descriptor, &weights);
    let mut pieces = Vec::new();
    let mut emit = |piece: &str| {
        pieces.push(piece.to_owned());
        ControlFlow::Continue(())
    };
    let answer = model.generate(&request("héjk ", 0.0, 50), &mut emit).expect("answers");
    let Response::Text { text, tokens, finish_reason } = answer.clone() else { panic!("text") };
    // 50 tokens run far past the window of 8.
    assert!(text.starts_with("wörd héjk wörd héjk"), "{text}");
    assert_eq!((tokens, finish_reason.as_str()), (50, "length"));
    assert_eq!(pieces.concat(), text);
    assert!(pieces.iter().all(|piece| piece.chars().count() <= 2));
    let input = Request::Generate(request("héjk ", 0.0, 50));
    assert_eq!(model.predict(vec![input.clone(), input]), [Ok(answer.clone()), Ok(answer)]);
}

#[test]
fn generation_is_a_function_of_the_request() {
    let (descriptor, weights) = trained("abcabd");
    let mut model = predictor(&descriptor, &weights);
    let mut say = |seed: u64| {
        let input = GenerateInput { seed, top_k: Some(40), ..request("ab", 3.0, 40) };
        model.generate(&input, &mut |_| ControlFlow::Continue(())).expect("answers")
    };
    let first = say(1);
    assert_ne!(first, say(2));
    assert_eq!(first, say(1));
}

#[test]
fn a_receiver_that_leaves_stops_the_generation() {
    let (descriptor, weights) = trained("abcd");
    let mut model = predictor(&descriptor, &weights);
    let mut seen = 0;
    let mut emit = |_: &str| {
        seen += 1;
        if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let answer = model.generate(&request("ab", 0.0, 50), &mut emit).expect("answers");
    let Response::Text { text, tokens, finish_reason } = answer else { panic!("text") };
    assert_eq!((text.as_str(), tokens, finish_reason.as_str()), ("cda", 3, "stopped"));
    // The next request starts afresh.
    let next = model.generate(&request("bc", 0.0, 2), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(next, Ok(Response::Text { text, .. }) if text == "da"));
}

#[test]
fn bad_requests_say_what_is_wrong() {
    let (descriptor, weights) = trained("ab");
    let mut model = predictor(&descriptor, &weights);
    let good = request("a", 1.0, 1);
    let cases = [
        (GenerateInput { prompt: String::new(), ..good.clone() }, "`prompt` is empty"),
        (GenerateInput { prompt: "x".repeat(1 << 20), ..good.clone() }, "expected at most 262144"),
        (GenerateInput { max_tokens: 0, ..good.clone() }, "expected 1 to 8192"),
        (GenerateInput { max_tokens: u32::MAX, ..good.clone() }, "expected 1 to 8192"),
        (GenerateInput { temperature: f32::NAN, ..good.clone() }, "`temperature` is NaN"),
        (GenerateInput { temperature: -1.0, ..good.clone() }, "`temperature` is -1"),
        (GenerateInput { top_k: Some(0), ..good.clone() }, "`top_k` is 0"),
    ];
    for (input, expected) in cases {
        let request = Request::Generate(input);
        let error = model.check(&request).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(model.predict(vec![request])[0].clone().expect_err("refused").0, error);
    }
    let image = Request::Image(ImageInput::Pixels(vec![]));
    assert!(model.check(&image).expect_err("refused").0.contains("send a `prompt`"));
}

#[test]
fn bad_model_files_say_what_is_wrong() {
    let (descriptor, weights) = trained("ab");
    let error = |descriptor: &ModelDescriptor, weights: &[u8]| {
        let Err(error) = Transformer.predictor(descriptor, weights, &Device::flex()) else {
            panic!("loaded")
        };
        error.to_string()
    };
    assert!(error(&descriptor, &weights[..100]).contains("not a safetensors file"));
    let set = |key: &str, value: u64| {
        let mut changed = descriptor.clone();
        changed.parameters["architecture"][key] = value.into();
        changed
    };
    let text = error(&set("layers", 2), &weights);
    assert!(text.contains("tensor `layers.1.attention.norm.weight` is missing"), "{text}");
    let text = error(&set("sequence_length", 9), &weights);
    assert!(text.contains("F32 [8, 32], expected F32 [9, 32]"), "{text}");
    assert!(error(&set("layers", u64::MAX), &weights).contains("expected at most 256"));
    assert!(error(&set("heads", 5), &weights).contains("not a multiple of heads = 5"));
    assert!(error(&set("vocabulary", 255), &weights).contains("less than the tokenizer's 256"));
    assert!(
        error(&ModelDescriptor { version: 2, ..descriptor.clone() }, &weights)
            .contains("version 2")
    );
    let wider =
        Architecture { layers: 1, width: 32, heads: 2, sequence_length: 8, vocabulary: 256 };
    let model = Architecture { layers: 2, ..wider }.model(0.0);
    let extra = safetensors(&model, &initial(&model, 1));
    let text = error(&descriptor, &extra);
    assert!(text.contains("does not belong to this model"), "{text}");
    let model = wider.model(0.0);
    let mut values = initial(&model, 1);
    values[1][0][3] = f32::NAN;
    let text = error(&descriptor, &safetensors(&model, &values));
    assert!(text.contains("tensor `layers.0.attention.norm.weight` holds NaN"), "{text}");
}

mod opening {
    //! From a job and files to a problem.

    use std::path::Path;

    use api::JobSpec;
    use burn::tensor::Device;

    use crate::algorithm::{Algorithm, LocalChannels, Problem};
    use crate::block::BlockInput;
    use crate::error::AlgorithmError;
    use crate::transformer::Transformer;
    use crate::transformer::settings::{Parameters, Setup};
    use crate::transformer::tokenizer::byte_level_json;

    fn open(folder: &Path, settings: &str) -> Result<Problem, AlgorithmError> {
        let data = folder.join("text.txt");
        std::fs::write(&data, "the quick brown fox jumps over the lazy dog\n".repeat(40))
            .expect("writable");
        let text = format!(
            "name = \"a\"\nalgorithm = \"transformer\"\n[channels]\ntrain = {{ uri = \"file://{}\" }}\n\
             [stop]\nmax_steps = 1\n[hyperparameters]\nsequence_length = 16\n{settings}",
            data.display()
        );
        let mut spec = JobSpec::parse(&text, "test", folder, &[]).expect("a job");
        spec.resolve(&Transformer.schema()).expect("legal");
        Transformer.open(&spec, &LocalChannels::from([("train".to_owned(), data)]))
    }

    #[test]
    fn bytes_are_the_default_and_the_tail_validates() {
        let folder = tempfile::tempdir().expect("a folder");
        let problem = open(folder.path(), "validation_fraction = 0.25\n").expect("opens");
        let validation = problem.validation.expect("held out");
        assert!((1..problem.train.len()).contains(&validation.len()));
        let batch = problem.train.microbatch(&[0, 1], None, &Device::flex()).expect("in range");
        let BlockInput::Tokens(tokens) = batch.input else { panic!("tokens") };
        assert_eq!((tokens.dims(), batch.tokens), ([2, 16], 32));
        let parameters = &problem.descriptor.parameters;
        assert_eq!(parameters["architecture"]["vocabulary"], 256);
        assert!(parameters.get("tokenizer").is_none());
        assert!(open(folder.path(), "").expect("opens").validation.is_none());
    }

    #[test]
    fn a_tokenizer_travels_inside_the_descriptor() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, byte_level_json()).expect("writable");
        let settings = format!("tokenizer = \"{}\"\n", path.display());
        // Whether the data reader takes plain text here is its business; the settings are ours.
        let spec = |settings: &str| {
            let text = format!(
                "name = \"a\"\nalgorithm = \"transformer\"\n[channels]\ntrain = {{ uri = \"file:///x\" }}\n\
                 [stop]\nmax_steps = 1\n[hyperparameters]\n{settings}"
            );
            let mut spec = JobSpec::parse(&text, "test", Path::new("/"), &[]).expect("a job");
            spec.resolve(&Transformer.schema()).expect("legal");
            spec
        };
        let setup = Setup::read(&spec(&settings)).expect("reads");
        assert_eq!(setup.architecture.vocabulary, 257);
        let descriptor = setup.descriptor();
        assert_eq!(descriptor.parameters["tokenizer"], byte_level_json());
        let (_, tokenizer) = Parameters::read(&descriptor).expect("reads back");
        assert_eq!(tokenizer.vocabulary(), 257);
        let error = |settings: &str| {
            let Err(error) = Setup::read(&spec(settings)) else { panic!("accepted") };
            error.to_string()
        };
        let small = error(&format!("{settings}vocabulary = 256\n"));
        assert!(small.contains("vocabulary = 256 is less than the 257 tokens"), "{small}");
        let heads = error("width = 10\nheads = 4\n");
        assert!(heads.contains("width = 10 is not a multiple of heads = 4"), "{heads}");
        let missing = error("tokenizer = \"/nowhere/t.json\"\n");
        assert!(missing.contains("/nowhere/t.json"), "{missing}");
    }

    #[test]
    fn a_missing_channel_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = "name = \"a\"\nalgorithm = \"transformer\"\n[channels]\ntrain = { uri = \"file:///x\" }\n[stop]\nmax_steps = 1\n";
        let mut spec = JobSpec::parse(text, "test", folder.path(), &[]).expect("a job");
        spec.resolve(&Transformer.schema()).expect("legal");
        let Err(error) = Transformer.open(&spec, &LocalChannels::new()) else { panic!("opened") };
        assert!(error.to_string().contains("channel `train` is missing"), "{error}");
    }
}
