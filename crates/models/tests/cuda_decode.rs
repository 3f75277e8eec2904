//! A recorded step on a CUDA device against the whole pass on the CPU. Without a device these tests say so and end.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use candle_core::{D, DType, Device, Tensor};
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, MethodConfig, random};
use espalier_models::input::PADDING;
use espalier_models::{LoadOptions, Model, ModelConfig, TokenBatch};
use serde_json::json;

const VOCAB: usize = 512;

/// A random Llama with an adapter whose factors are both random: the same on every device.
fn model(method: &str, (device, dtype): (&Device, DType)) -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    let options = LoadOptions { dtype, device: device.clone(), ..LoadOptions::cpu() };
    let config = ModelConfig::from_json(std::path::Path::new("test"), config).unwrap();
    let mut model = Model::random(config, &options).unwrap();
    let config = AdapterConfig::new(MethodConfig::by_name(method).unwrap());
    let attached = attach(&mut model, &config, Origin::Seed(0), DType::F32, device).unwrap();
    for parameter in attached.parameters.trainable().filter(|p| p.name.contains("lora_B")) {
        let values =
            random::normal(&mut random::stream(7, &parameter.name), 0.05, parameter.tensor.shape(), &Device::Cpu);
        parameter.var().unwrap().set(&values.unwrap().to_device(device).unwrap()).unwrap();
    }
    let mut set = AdapterSet::new();
    set.add("a", attached).unwrap();
    set.activate(&mut model, &[("a", 1.0)]).unwrap();
    model
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * i * 31 + i * 7 + 3) as u32 % VOCAB as u32).collect()
}

/// Root mean square of a - b over that of b.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let wide = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let (a, b) = (wide(a), wide(b));
    let square = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    (square((a - &b).unwrap()) / square(b)).sqrt()
}

#[test]
fn a_recorded_step_gives_what_the_whole_pass_gives() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    for method in ["lora", "dora"] {
        let (on, plain) = (model(method, (&device, DType::BF16)), model(method, (&Device::Cpu, DType::F32)));
        let flow = Flow::eval();
        for (rows, prompt) in [(1, 5), (3, 64), (9, 17), (32, 33)] {
            let (steps, rest) = (12, prompt + 13);
            let ids = tokens(rows * rest);
            let whole = plain.forward(&TokenBatch::new(ids.clone(), rows, rest).unwrap(), &flow).unwrap();
            // Rows with odd numbers have shorter prompts, padded on the left.
            let pad = |row: usize| 3 * (row % 2);
            let next =
                |step: usize| -> Vec<u32> { (0..rows).map(|row| ids[row * rest + prompt - pad(row) + step]).collect() };
            let want = |step: usize| {
                let of_row = |row| whole.narrow(0, row, 1).unwrap().narrow(1, prompt - pad(row) + step - 1, 1).unwrap();
                Tensor::cat(&(0..rows).map(of_row).collect::<Vec<_>>(), 0).unwrap().squeeze(1).unwrap()
            };
            let cells = |cell: &dyn Fn(usize, Option<usize>) -> u32| -> Vec<u32> {
                let of_row = |row| (0..prompt).map(move |at: usize| (row, at.checked_sub(pad(row))));
                (0..rows).flat_map(of_row).map(|(row, position)| cell(row, position)).collect()
            };
            let mut input =
                TokenBatch::new(cells(&|row, p| p.map_or(0, |p| ids[row * rest + p])), rows, prompt).unwrap();
            input.positions = cells(&|_, position| position.unwrap_or(0) as u32);
            if rows > 1 {
                input.segments = Some(cells(&|_, position| position.map_or(PADDING, |_| 0)));
            }
            let mut cache = on.new_cache();
            let scores = on.advance(&input, &mut cache, &flow).unwrap();
            let off = distance(&scores, &want(0));
            assert!(off < 0.03, "{method}, {rows} rows of {prompt}: {off} after the prompt");
            let mut decoder = on.decoder(&cache, cache.len() + steps, &flow).unwrap().unwrap();
            let mut same = 0;
            for step in 0..steps {
                let want = want(step + 1);
                if step % 2 == 0 {
                    let off = distance(&decoder.step(&next(step)).unwrap(), &want);
                    assert!(off < 0.03, "{method}, {rows} rows of {prompt}, step {step}: {off}");
                } else {
                    let best = want.argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap();
                    let chosen = decoder.step_greedy(Some(&next(step))).unwrap();
                    same += chosen.iter().zip(&best).filter(|(a, b)| a == b).count();
                }
            }
            assert!(10 * same >= 8 * rows * steps / 2, "{method}, {rows} rows of {prompt}: {same} of the best tokens");
            assert!(decoder.step(&next(0)).unwrap_err().to_string().contains("full"));
        }
    }
}

#[test]
fn greedy_steps_follow_their_own_choices() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let (model, flow) = (model("lora", (&device, DType::BF16)), Flow::eval());
    let input = TokenBatch::new(tokens(20), 2, 10).unwrap();
    let mut cache = model.new_cache();
    let first = model.advance(&input, &mut cache, &flow).unwrap().argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap();
    let [mut alone, mut told] = [(); 2].map(|()| model.decoder(&cache, 30, &flow).unwrap().unwrap());
    let (mut next, mut same) = (first.clone(), 0);
    for step in 0..8 {
        let chosen = alone.step_greedy((step == 0).then_some(&*first)).unwrap();
        let other = told.step_greedy(Some(&next)).unwrap();
        // Last bits of scores differ, so the better of two may.
        same += chosen.iter().zip(&other).filter(|(a, b)| a == b).count();
        next = chosen;
    }
    assert!(same >= 13, "{same} of 16");
    assert!(model.decoder(&cache, 9, &flow).is_err());
}
