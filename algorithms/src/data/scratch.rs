//! Scratch.
use std::path::Path;
use api::JobSpec;
use burn::tensor::{Device, Tensor};
use crate::block::*;
use crate::{initial_values, tensor_from_slice};

#[test]
#[ignore = "scratch"]
fn train() {
    let job = std::env::var("JOB").expect("JOB");
    let sets: Vec<String> = std::env::var("SET").unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    let mut spec = JobSpec::load(Path::new(&job), &sets).expect("loads");
    let algorithm = crate::algorithm(&spec.algorithm).expect("known");
    spec.resolve(&algorithm.schema()).expect("resolves");
    let channels: crate::LocalChannels = spec.channels.iter().map(|(k, c)| (k.clone(), c.uri.replace("file://", "").into())).collect();
    for p in channels.values() { super::ensure_recipe(p, &mut |_, _| {}).expect("recipe"); }
    let problem = algorithm.open(&spec, &channels).expect("opens");
    let device = Device::flex().autodiff();
    let number = |n: &str| match &spec.hyperparameters[n] { api::schema::Value::Float(v) => *v as f32, api::schema::Value::Integer(v) => *v as f32, _ => panic!() };
    let (lr, wd, b1, b2, warm, minr) = (number("learning_rate"), number("weight_decay"), number("beta1"), number("beta2"), number("warmup_steps"), number("min_learning_rate_ratio"));
    let mut params: Vec<Vec<Vec<f32>>> = problem.model.blocks.iter().map(|b| b.params().iter().map(|p| { let mut v = vec![0.0; p.len()]; initial_values(spec.seed, p, &mut v); v }).collect()).collect();
    let zeros = || params.iter().map(|b| b.iter().map(|p| vec![0.0f32; p.len()]).collect::<Vec<_>>()).collect::<Vec<_>>();
    let (mut m, mut v) = (zeros(), zeros());
    let count: usize = params.iter().flatten().map(Vec::len).sum();
    let global = spec.batch.global.get() as u64; let micro = spec.batch.microbatch_size() as u64;
    let n = problem.train.len();
    let steps = spec.stop.max_steps.unwrap_or_else(|| (spec.stop.max_epochs.expect("e") * n).div_ceil(global));
    println!("{n} samples, {steps} steps, {count} parameters, validation {:?}", problem.validation.as_ref().map(|v| v.len()));
    let start = std::time::Instant::now();
    let evaluate = |params: &Vec<Vec<Vec<f32>>>| {
        let Some(val) = &problem.validation else { return (0.0, 0.0) };
        let device = Device::flex();
        let (mut sum, mut right, mut c) = (0.0f64, 0.0, 0u64);
        let all: Vec<u64> = (0..val.len()).collect();
        for chunk in all.chunks(32) {
            let b = val.microbatch(chunk, None, &device).expect("mb");
            let mut x = b.input;
            for (block, p) in problem.model.blocks.iter().zip(params) {
                let p: Vec<Tensor<1>> = p.iter().map(|v| tensor_from_slice(v, &device)).collect();
                x = BlockInput::Features(block.forward(&p, x, Mode::Evaluate));
            }
            let BlockInput::Features(x) = x else { panic!() };
            let l = (problem.model.loss)(x, &b.targets, true);
            sum += l.sum.into_scalar::<f32>() as f64; right += l.sums[0]; c += l.count;
        }
        (sum / c as f64, right / c as f64)
    };
    let mut order: Vec<u64> = Vec::new();
    let mut epoch = 0u64;
    for step in 0..steps {
        while (order.len() as u64) < global {
            let mut e: Vec<u64> = (0..n).collect();
            e.sort_by_cached_key(|i| *blake3::hash(&[i.to_le_bytes(), epoch.to_le_bytes(), spec.seed.to_le_bytes()].concat()).as_bytes());
            order.extend(e); epoch += 1;
        }
        let batch: Vec<u64> = order.drain(..global as usize).collect();
        let mut grads = params.iter().map(|b| b.iter().map(|p| vec![0.0f32; p.len()]).collect::<Vec<_>>()).collect::<Vec<_>>();
        let (mut loss, mut total) = (0.0, 0u64);
        for (mb, chunk) in batch.chunks(micro as usize).enumerate() {
            let key = StepKey { seed: spec.seed, step, microbatch: mb as u64 };
            let b = problem.train.microbatch(chunk, Some(key), &device).expect("mb");
            let leaves: Vec<Vec<Tensor<1>>> = params.iter().map(|p| p.iter().map(|v| tensor_from_slice(v, &device).require_grad()).collect()).collect();
            let mut x = b.input;
            for (block, p) in problem.model.blocks.iter().zip(&leaves) {
                x = BlockInput::Features(block.forward(p, x, Mode::Train(key)));
            }
            let BlockInput::Features(x) = x else { panic!() };
            let l = (problem.model.loss)(x, &b.targets, false);
            total += l.count;
            loss += l.sum.clone().into_scalar::<f32>() as f64;
            let g = l.sum.backward();
            for (gb, lb) in grads.iter_mut().zip(&leaves) { for (gp, lp) in gb.iter_mut().zip(lb) {
                let d: Vec<f32> = lp.grad(&g).expect("grad").into_data().iter().collect();
                for (a, b) in gp.iter_mut().zip(d) { *a += b; }
            } }
        }
        let norm = grads.iter().flatten().flatten().map(|g| ((*g / total as f32) as f64).powi(2)).sum::<f64>().sqrt() as f32;
        let scale = (1.0 / norm.max(1.0)) / total as f32;
        let t = step as f32;
        let rate = lr * if t < warm { (t + 1.0) / warm } else { let p = (t - warm) / (steps as f32 - warm).max(1.0); minr + (1.0 - minr) * 0.5 * (1.0 + (std::f32::consts::PI * p).cos()) };
        let (c1, c2) = (1.0 - b1.powi(step as i32 + 1), 1.0 - b2.powi(step as i32 + 1));
        for (bi, block) in problem.model.blocks.iter().enumerate() { for (pi, p) in block.params().iter().enumerate() {
            for i in 0..p.len() {
                let g = grads[bi][pi][i] * scale;
                let (mm, vv) = (&mut m[bi][pi][i], &mut v[bi][pi][i]);
                *mm = b1 * *mm + (1.0 - b1) * g; *vv = b2 * *vv + (1.0 - b2) * g * g;
                let x = &mut params[bi][pi][i];
                if p.decay { *x -= rate * wd * *x; }
                *x -= rate * (*mm / c1) / ((*vv / c2).sqrt() + 1e-8);
            }
        } }
        let every = std::env::var("EVERY").ok().and_then(|e| e.parse().ok()).unwrap_or(50);
        if (step + 1) % every == 0 || step + 1 == steps {
            let (vl, va) = evaluate(&params);
            println!("step {} loss {:.4} val {:.4} acc {:.4} {:.1}s", step + 1, loss / total as f64, vl, va, start.elapsed().as_secs_f32());
        }
    }
}
