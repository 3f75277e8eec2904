//! What stands before the sequences, as PEFT wrote it: same scores, alone, padded, packed and generated, and round trips.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use common::{device, difference, golden, load, logits, tensors};
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::formats::forms::{self, Form};
use espalier_adapters::formats::{check, folder};
use espalier_adapters::prompt::{NO_WEIGHT, Prompt};
use espalier_adapters::{AdapterSet, Flow, Host};
use espalier_models::input::PADDING;
use espalier_models::{Model, TokenBatch};

const TOLERANCE: f64 = 1e-4;

const CASES: &[&str] = &[
    "prompt_tuning",
    "prompt_tuning_vocab",
    "gpt2_prompt_tuning",
    "gemma2_prompt_tuning",
    "mistral_prompt_tuning",
    "bert_prompt_tuning",
    "roberta_prompt_tuning",
    "prefix_tuning",
    "prefix_projection",
    "gpt2_prefix_tuning",
    "qwen3_prefix_tuning",
    "gemma2_prefix_tuning",
    "mistral_prefix_tuning",
    "p_tuning",
    "p_tuning_lstm",
    "bert_p_tuning",
];

struct Case {
    model: Model,
    set: AdapterSet,
    golden: BTreeMap<String, Tensor>,
}

impl Case {
    fn open(name: &str) -> Self {
        let path = golden().join("adapters").join(name);
        let files = folder::read(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut model = load(&golden().join(files.config.base.clone().unwrap()));
        let attached =
            folder::load(&mut model, files, false, DType::F32, &device()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut set = AdapterSet::new();
        set.add("a", attached).unwrap();
        set.activate(&mut model, &[("a", 1.0)]).unwrap();
        Self { model, set, golden: tensors(&path.join("expected.safetensors")) }
    }

    fn rows(&self, name: &str) -> Vec<Vec<u32>> {
        self.golden[name].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap()
    }

    fn is_classifier(&self) -> bool {
        self.model.config().labels().is_some()
    }

    fn scores(&self, input: &TokenBatch) -> Tensor {
        self.model.forward(input, &Flow::eval()).unwrap().detach()
    }

    fn alone(&self, row: &[u32]) -> Tensor {
        self.scores(&TokenBatch::new(row.to_vec(), 1, row.len()).unwrap())
    }
}

#[test]
fn scores_equal_peft() {
    let mut failures = Vec::new();
    for name in CASES {
        let case = Case::open(name);
        let found = logits(&case.model, &case.golden["ids"]);
        let d = difference(&found, &case.golden["logits"]);
        eprintln!("{name:24} {d:.2e}");
        if d.is_nan() || d > TOLERANCE {
            failures.push(format!("{name}: {d:.3e}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn padded_rows_score_as_in_peft() {
    for name in CASES {
        let case = Case::open(name);
        let mask = case.rows("mask_pad");
        let used: Vec<usize> = mask.iter().map(|row| row.iter().filter(|m| **m == 1).count()).collect();
        let rows: Vec<Vec<u32>> = case.rows("ids_pad").iter().zip(&used).map(|(row, n)| row[..*n].to_vec()).collect();
        assert!(used[1] < used[0], "{name}: nothing is padded");
        let found = case.scores(&TokenBatch::padded(&rows, 0).unwrap());
        for (i, n) in used.iter().enumerate() {
            let of = |t: &Tensor| {
                let row = t.get(i).unwrap();
                if case.is_classifier() { row } else { row.narrow(0, 0, *n).unwrap() }
            };
            let d = difference(&of(&found), &of(&case.golden["logits_pad"]));
            assert!(d < TOLERANCE, "{name}: row {i} differs by {d}");
        }
    }
}

/// The rows in one, each a segment of its own.
fn packed(rows: &[Vec<u32>]) -> TokenBatch {
    let length = rows.iter().map(Vec::len).sum();
    let segments = rows.iter().zip(0..).flat_map(|(row, s)| vec![s; row.len()]).collect();
    TokenBatch {
        batch: 1,
        length,
        ids: rows.concat(),
        positions: rows.iter().flat_map(|row| 0..row.len() as u32).collect(),
        segments: Some(segments),
        token_types: None,
    }
}

#[test]
fn packed_sequences_score_as_alone() {
    for name in CASES {
        let case = Case::open(name);
        if case.is_classifier() {
            continue;
        }
        let rows = case.rows("ids");
        let rows = [rows[0][..5].to_vec(), rows[1].clone(), rows[0][5..8].to_vec()];
        let together = case.scores(&packed(&rows));
        let mut at = 0;
        for row in &rows {
            let d = difference(&together.narrow(1, at, row.len()).unwrap(), &case.alone(row));
            assert!(d < TOLERANCE, "{name}: {d}");
            at += row.len();
        }
        // Beside a row of one sequence, which ends in padding then.
        let mut beside = packed(&rows);
        let other: Vec<u32> = rows[1].iter().cycle().take(beside.length).copied().collect();
        beside.batch = 2;
        beside.ids.extend(&other);
        beside.positions.extend(0..other.len() as u32);
        beside.segments = beside.segments.map(|s| s.into_iter().chain(vec![7; other.len()]).collect());
        let d = difference(&case.scores(&beside).narrow(0, 1, 1).unwrap(), &case.alone(&other));
        assert!(d < TOLERANCE, "{name}: beside packed ones: {d}");
    }
}

#[test]
fn going_on_after_a_cache_scores_as_the_whole() {
    for name in CASES {
        let case = Case::open(name);
        if case.is_classifier() {
            continue;
        }
        // Rows of two lengths, padded on the left, then token by token.
        let rows = case.rows("ids");
        let (first, second) = (rows[0].clone(), rows[1][..8].to_vec());
        let starts = [6usize, 4];
        let pad = starts[0] - starts[1];
        let mut segments = vec![0; 2 * starts[0]];
        segments[starts[0]..starts[0] + pad].fill(PADDING);
        let ids = [&first[..6], &vec![0; pad], &second[..4]].concat();
        let positions = (0..6).chain(vec![0; pad]).chain(0..4).collect();
        let input = TokenBatch { batch: 2, length: 6, ids, positions, segments: Some(segments), token_types: None };
        let mut cache = case.model.new_cache();
        let mut scores = case.model.advance(&input, &mut cache, &Flow::eval()).unwrap();
        for step in 0..4usize {
            for (i, row) in [&first, &second].into_iter().enumerate() {
                let whole = case.alone(&row[..starts[i] + step]);
                let last = whole.narrow(1, starts[i] + step - 1, 1).unwrap().squeeze(1).unwrap();
                let d = difference(&scores.narrow(0, i, 1).unwrap(), &last);
                assert!(d < TOLERANCE, "{name}: row {i} step {step}: {d}");
            }
            let next = TokenBatch {
                batch: 2,
                length: 1,
                ids: vec![first[6 + step], second[4 + step]],
                positions: vec![(6 + step) as u32, (4 + step) as u32],
                segments: None,
                token_types: None,
            };
            scores = case.model.advance(&next, &mut cache, &Flow::eval()).unwrap();
        }
        assert_eq!(cache.len(), 6 + case.model.virtual_tokens() + 4, "{name}");
    }
}

#[test]
fn greedy_continuations_are_those_of_peft() {
    let (mut by_passes, mut by_decoder) = (0, 0);
    for name in CASES {
        let case = Case::open(name);
        let Some(expected) = case.golden.get("generated") else { continue };
        let expected = expected.to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap().concat();
        let mut row = case.rows("ids")[0].clone();
        let start = row.len();
        let mut cache = case.model.new_cache();
        let input = TokenBatch::new(row.clone(), 1, start).unwrap();
        let mut scores = case.model.advance(&input, &mut cache, &Flow::eval()).unwrap();
        let choose = |scores: &Tensor| scores.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0];
        // By whole passes, and by the decoder where the model has one.
        if let Some(mut decoder) = case.model.decoder(&cache, 64, &Flow::eval()).unwrap() {
            let mut made = vec![choose(&scores)];
            while made.len() < expected.len() {
                let last = [*made.last().unwrap()];
                made.push(choose(&decoder.step(&last).unwrap()));
            }
            assert_eq!(made, expected, "{name}: by the decoder");
            by_decoder += 1;
        }
        for _ in 0..expected.len() {
            row.push(choose(&scores));
            let next = TokenBatch::starting_at(vec![row[row.len() - 1]], 1, 1, row.len() - 1).unwrap();
            scores = case.model.advance(&next, &mut cache, &Flow::eval()).unwrap();
        }
        assert_eq!(row[start..], expected, "{name}");
        by_passes += 1;
    }
    assert!(by_passes >= 6 && by_decoder >= 1, "{by_passes} by passes, {by_decoder} by the decoder");
}

#[test]
fn files_say_the_same_after_a_round_trip_and_stand_the_check() {
    for name in CASES {
        let mut case = Case::open(name);
        let source = golden().join("adapters").join(name);
        let report = check::check(&source, None);
        assert!(report.faults.is_empty(), "{name}: {:?}", report.faults);
        let temp = tempfile::tempdir().unwrap();
        folder::save(&mut case.model, case.set.get("a").unwrap(), temp.path()).unwrap();
        let theirs = tensors(&source.join(folder::WEIGHTS_FILE));
        let ours = tensors(&temp.path().join(folder::WEIGHTS_FILE));
        assert!(ours.keys().eq(theirs.keys()), "{name}: {:?} against {:?}", ours.keys(), theirs.keys());
        for (key, tensor) in &ours {
            assert_eq!(difference(tensor, &theirs[key]), 0.0, "{name}: {key}");
        }
        for form in [Form::Mlx, Form::Gguf] {
            let other = temp.path().join("other");
            let refused =
                forms::save(form, &mut case.model, case.set.get("a").unwrap(), &other).unwrap_err().to_string();
            let named = if case.is_classifier() { "trained whole" } else { "virtual tokens" };
            assert!(refused.contains(named), "{name}: {refused}");
        }
        let files = folder::read(temp.path()).unwrap();
        assert_eq!(files.config.method, case.set.get("a").unwrap().config.method, "{name}");
        let report = check::check(temp.path(), None);
        assert!(report.faults.is_empty(), "{name}: {:?}", report.faults);
    }
}

#[test]
fn what_stands_before_is_not_merged_and_goes_when_it_is_switched_off() {
    for name in CASES {
        let mut case = Case::open(name);
        let refused = case.set.merge(&mut case.model, DType::F32).unwrap_err().to_string();
        assert!(refused.contains(NO_WEIGHT), "{name}: {refused}");
        let refused = case.set.activate(&mut case.model, &[("a", 0.5)]).unwrap_err().to_string();
        assert!(refused.contains("weight 1"), "{name}: {refused}");
        let refused = case.set.activate_by_row(&mut case.model, &[Some("a"), None]).unwrap_err().to_string();
        assert!(refused.contains("alone"), "{name}: {refused}");
        assert!(difference(&logits(&case.model, &case.golden["ids"]), &case.golden["logits"]) < TOLERANCE, "{name}");
        case.set.disable(&mut case.model).unwrap();
        let base = load(&golden().join(case.set.get("a").unwrap().config.base.clone().unwrap()));
        let d = difference(&logits(&case.model, &case.golden["ids"]), &logits(&base, &case.golden["ids"]));
        assert_eq!(d, 0.0, "{name}");
    }
}

#[test]
fn encoders_make_what_those_of_peft_make() {
    for name in ["prefix_projection", "p_tuning", "p_tuning_lstm", "bert_p_tuning"] {
        let case = Case::open(name);
        let config = folder::read_config(&golden().join("adapters").join(name)).unwrap();
        let mut model = load(&golden().join(config.base.clone().unwrap()));
        let made = attach(&mut model, &config, Origin::Seed(3), DType::F32, &device()).unwrap();
        let mut set = 0;
        for (key, value) in &case.golden {
            let Some(own) = key.strip_prefix("encoder.") else { continue };
            let parameter =
                made.parameters.get(&format!("prompt_encoder.{own}")).unwrap_or_else(|| panic!("{name}: {own}"));
            parameter.var().unwrap().set(value).unwrap();
            set += 1;
        }
        let own = made.parameters.iter().filter(|p| p.name.starts_with("prompt_encoder.")).count();
        assert_eq!(set, own, "{name}: parameters");
        let theirs = tensors(&golden().join("adapters").join(name).join(folder::WEIGHTS_FILE));
        let (Prompt::Tokens(ours) | Prompt::KeysValues(ours)) = made.prompt.unwrap().prompt(&Flow::eval()).unwrap();
        let d = difference(&ours, &theirs["prompt_embeddings"]);
        assert!(d < 1e-5, "{name}: {d}");
    }
}

#[test]
fn sizes_of_another_model_are_refused_with_both() {
    for (name, key) in
        [("prompt_tuning", "token_dim"), ("prefix_tuning", "num_layers"), ("p_tuning", "num_attention_heads")]
    {
        let source = golden().join("adapters").join(name);
        let temp = tempfile::tempdir().unwrap();
        std::fs::copy(source.join(folder::WEIGHTS_FILE), temp.path().join(folder::WEIGHTS_FILE)).unwrap();
        let text = std::fs::read_to_string(source.join(folder::CONFIG_FILE)).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json[key] = 77.into();
        std::fs::write(temp.path().join(folder::CONFIG_FILE), json.to_string()).unwrap();
        let files = folder::read(temp.path()).unwrap();
        let mut model = load(&golden().join(files.config.base.clone().unwrap()));
        let failed = folder::load(&mut model, files, false, DType::F32, &device()).unwrap_err().to_string();
        assert!(failed.contains(key) && failed.contains("77"), "{name}: {failed}");
        assert!(model.prompt_slot().unwrap().get().is_none());
    }
}
