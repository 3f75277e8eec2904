//! Evaluation against scores computed the plain way from the probe's logits.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use candle_core::{Device, Tensor};
use common::{BOS, VOCAB, classifier, codec, llama};
use espalier_adapters::{Flow, Host, ModuleMut};
use espalier_data::{EncodeOptions, Example, IGNORE, Message, Row, TextCodec};
use espalier_infer::eval::{
    ChoiceRow, EvalOptions, choice_accuracy, classification, exact_match, pair_separator, perplexity,
};
use espalier_infer::{GenerateOptions, end_ids, generate, probe, prompt_ids};
use espalier_models::{Model, TokenBatch};

/// ln p of token `place` of a row after those before, in f64.
fn log_p(model: &Model, ids: &[u32], place: usize, id: u32) -> f64 {
    let logits = probe::logits(model, &[ids.to_vec()]).unwrap();
    let row: Vec<f32> = logits.get(0).unwrap().get(place - 1).unwrap().to_vec1().unwrap();
    let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row[id as usize] - most - row.iter().map(|x| (x - most).exp()).sum::<f64>().ln()
}

fn example(ids: &[u32], trained: impl Fn(usize) -> bool, class: Option<u32>) -> Example {
    let labels = ids.iter().enumerate().map(|(i, id)| if trained(i) { *id as i32 } else { IGNORE }).collect();
    Example { input_ids: ids.to_vec(), labels, class, ..Example::default() }
}

fn options(batch_size: usize) -> EvalOptions {
    EvalOptions { batch_size, ..EvalOptions::default() }
}

#[test]
fn perplexity_is_the_mean_over_trained_tokens() {
    let model = llama();
    let long: Vec<u32> = (0..129).collect();
    let examples = [
        example(&[BOS, 1, 2, 3, 4, 5, 6], |i| i >= 3, None),
        example(&[7, 8], |_| true, None),
        example(&[9, 10, 11, 12], |_| false, None),
        example(&[13, 14, 15], |_| true, None),
        example(&long, |_| true, None),
    ];
    let mut sum = 0.0;
    for (example, from) in [(&examples[0], 3), (&examples[1], 1), (&examples[3], 1)] {
        for place in from..example.input_ids.len() {
            sum -= log_p(&model, &example.input_ids, place, example.input_ids[place]);
        }
    }
    for size in [1, 2, 16] {
        let mut calls = Vec::new();
        let found = perplexity(&model, &examples, &options(size), &mut |done, of| calls.push((done, of))).unwrap();
        assert_eq!((found.used, found.tokens), (3, 7));
        assert!((found.loss - sum / 7.0).abs() < 1e-5, "{} for {}", found.loss, sum / 7.0);
        assert!((found.perplexity - found.loss.exp()).abs() < 1e-9);
        assert_eq!(found.refused.get("no_trained_token"), Some(&1));
        assert_eq!(found.refused.get("longer_than_the_model"), Some(&1));
        assert_eq!(calls.last(), Some(&(3, 3)));
    }
}

#[test]
fn perplexity_refuses_what_does_not_fit() {
    let model = llama();
    let run = |model: &Model, examples: &[Example], size| {
        perplexity(model, examples, &options(size), &mut |_, _| {}).unwrap_err().to_string()
    };
    let mut foreign = example(&[1, 2, 3], |_| true, None);
    foreign.labels[2] = VOCAB as i32;
    assert!(run(&model, &[foreign], 4).contains("label 300 of token 2 is outside the model's vocabulary of 300"));
    let mut short = example(&[1, 2, 3], |_| true, None);
    short.labels.pop();
    assert!(run(&model, &[short], 4).contains("2 labels for 3 tokens"));
    assert!(run(&model, &[], 4).contains("nothing to evaluate"));
    assert!(run(&model, &[example(&[1, 2], |_| false, None)], 4).contains("no_trained_token: 1"));
    assert!(run(&model, &[example(&[1, 2], |_| true, None)], 0).contains("batch_size = 0"));
    assert!(
        run(&classifier(), &[example(&[1, 2], |_| true, None)], 4).contains("`bert` cannot be used for perplexity")
    );
}

#[test]
fn exact_match_compares_trimmed_greedy_answers() {
    let (model, codec) = (llama(), codec());
    let answers = GenerateOptions { max_new_tokens: 6, eos: end_ids(&model, &codec), ..GenerateOptions::default() };
    let answer =
        |ids: Vec<u32>| generate(&model, &codec, &[ids], &answers, &mut |_| {}).unwrap().completions[0].text.clone();
    let chat = [Message::new("user", "bad"), Message::new("assistant", "fee"), Message::new("user", "cab")];
    let said = answer(codec.encode_prompt(&chat, None).unwrap());
    let continued = answer(prompt_ids(&codec, "egg fad ").unwrap());
    assert!(!said.trim().is_empty() && !continued.trim().is_empty(), "{said:?} {continued:?}");
    let mut right = chat.to_vec();
    right.push(Message::new("assistant", format!(" {said}\n")));
    let pair =
        |prompt: &str, completion: &str| Row::PromptCompletion { prompt: prompt.into(), completion: completion.into() };
    let rows = [
        pair("egg fad ", &continued),
        Row::Messages { messages: right, tools: None },
        pair("egg fad ", "something else"),
        Row::Text { text: "x".into() },
        Row::Messages { messages: vec![Message::new("user", "x")], tools: None },
        pair("x", "  "),
        pair(&"x".repeat(200), "y"),
    ];
    let mut last = (0, 0);
    let sampled = GenerateOptions { batch_size: 2, ..answers.clone() };
    let found = exact_match(&model, &codec, &rows, &sampled, &mut |done, of| last = (done, of)).unwrap();
    assert_eq!((found.used, found.correct, last), (3, 2, (3, 3)));
    assert!((found.accuracy - 2.0 / 3.0).abs() < 1e-12);
    let verdicts: Vec<_> = found.pairs.iter().map(|p| (p.row, p.correct)).collect();
    assert_eq!(verdicts, [(0, true), (1, true), (2, false)]);
    assert!(found.pairs[1].prompt.ends_with("<|user|>cab</s><|assistant|>"));
    assert_eq!(found.refused.values().sum::<usize>(), 4);
    for reason in ["no_prompt_and_answer", "no_assistant_turn", "empty_reference", "prompt_longer_than_the_model"] {
        assert_eq!(found.refused.get(reason), Some(&1), "{reason}");
    }
    let error = exact_match(&model, &codec, &rows[3..], &answers, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("no_assistant_turn: 1"), "{error}");
    let bare = TextCodec::ids_only(VOCAB);
    assert!(
        exact_match(&model, &bare, &rows[..1], &answers, &mut |_, _| {}).unwrap_err().to_string().contains("tokenizer")
    );
}

#[test]
fn choices_are_scored_by_their_tokens() {
    let (model, codec) = (llama(), codec());
    let row = |prompt: &str, choices: &[&str], answer| ChoiceRow {
        prompt: prompt.into(),
        choices: choices.iter().map(|c| c.to_string()).collect(),
        answer,
    };
    let rows = [
        row("Which day?", &["a bad one", "good", "none of them"], 1),
        row("He said ", &["yes", "no"], 0),
        row("p", &["x", "y"], 7),
        row(&"long ".repeat(60), &["x", "y"], 0),
        row("q", &["", " "], 0),
    ];
    let mut expected = Vec::new();
    for question in &rows[..2] {
        let scores = question.choices.iter().map(|choice| {
            let prompt = prompt_ids(&codec, question.prompt.trim_end()).unwrap();
            let ids = prompt_ids(&codec, &format!("{} {choice}", question.prompt.trim_end())).unwrap();
            assert_eq!(ids[..prompt.len()], prompt);
            (prompt.len()..ids.len()).map(|place| log_p(&model, &ids, place, ids[place])).sum::<f64>()
        });
        expected.push(scores.collect::<Vec<f64>>());
    }
    for size in [1, 3, 16] {
        let found = choice_accuracy(&model, &codec, &rows, &options(size), &mut |_, _| {}).unwrap();
        assert_eq!(found.used, 2);
        for (answer, expected) in found.answers.iter().zip(&expected) {
            for (a, b) in answer.log_likelihoods.iter().zip(expected) {
                assert!((a - b).abs() < 1e-4, "{a} for {b}");
            }
            let best = |scores: &[f64]| (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap();
            let a_byte: Vec<f64> =
                expected.iter().zip(&rows[answer.row].choices).map(|(s, c)| s / c.len() as f64).collect();
            assert_eq!((answer.chosen, answer.chosen_normalised), (best(expected), best(&a_byte)));
        }
        let right = found.answers.iter().filter(|a| a.chosen == rows[a.row].answer).count();
        assert_eq!((found.correct, found.accuracy), (right, right as f64 / 2.0));
        assert!((found.chance - (1.0 / 3.0 + 0.5) / 2.0).abs() < 1e-12);
        assert_eq!(found.refused.get("answer_is_no_choice"), Some(&1));
        assert_eq!(found.refused.get("empty_choice"), Some(&1));
        assert_eq!(found.refused.get("longer_than_the_model"), Some(&1));
    }
    let chat = codec.with_options(EncodeOptions { apply_chat_template: true, ..EncodeOptions::default() });
    let found = choice_accuracy(&model, &chat, &rows[1..2], &options(4), &mut |_, _| {}).unwrap();
    let prompt = chat.encode_text("<|user|>He said</s><|assistant|>", false).unwrap();
    let ids = chat.encode_text("<|user|>He said</s><|assistant|>no", false).unwrap();
    let score: f64 = (prompt.len()..ids.len()).map(|place| log_p(&model, &ids, place, ids[place])).sum();
    assert!((found.answers[0].log_likelihoods[1] - score).abs() < 1e-4);
    assert!(choice_accuracy(&classifier(), &chat, &rows, &options(4), &mut |_, _| {}).is_err());
    assert!(
        choice_accuracy(&model, &chat, &[], &options(4), &mut |_, _| {}).unwrap_err().to_string().contains("nothing")
    );
}

#[test]
fn an_empty_prompt_scores_choices_behind_the_first_special_token() {
    let codec = codec();
    let rows = [ChoiceRow { prompt: String::new(), choices: vec!["bad".into(), "egg".into()], answer: 0 }];
    let found = choice_accuracy(&llama(), &codec, &rows, &options(2), &mut |_, _| {}).unwrap();
    let ids = prompt_ids(&codec, " bad").unwrap();
    let score: f64 = (1..ids.len()).map(|place| log_p(&llama(), &ids, place, ids[place])).sum();
    assert!((found.answers[0].log_likelihoods[0] - score).abs() < 1e-4);
}

#[test]
fn classification_counts_by_class_and_prediction() {
    let model = classifier();
    let rows: Vec<Vec<u32>> = (0..9u32).map(|i| (0..=i).map(|k| (31 * k + 17 * i) % 256).collect()).collect();
    let predicted: Vec<u32> = rows
        .iter()
        .map(|row| {
            let scores: Vec<f32> =
                probe::logits(&model, std::slice::from_ref(row)).unwrap().get(0).unwrap().to_vec1().unwrap();
            (0..3).max_by(|a, b| scores[*a as usize].total_cmp(&scores[*b as usize])).unwrap()
        })
        .collect();
    // The first three are labelled as predicted, the others one further.
    let class = |i: usize| if i < 3 { predicted[i] } else { (predicted[i] + 1) % 3 };
    let mut examples: Vec<Example> =
        rows.iter().enumerate().map(|(i, row)| example(row, |_| false, Some(class(i)))).collect();
    examples.push(example(&[1], |_| false, None));
    examples.push(example(&[1], |_| false, Some(3)));
    examples.push(example(&[2; 65], |_| false, Some(0)));
    let found = classification(&model, &examples, &options(4), &mut |_, _| {}).unwrap();
    assert_eq!((found.used, found.refused.len()), (9, 3));
    assert!((found.accuracy - 1.0 / 3.0).abs() < 1e-12);
    let expected: Vec<Option<u32>> = predicted.iter().map(|p| Some(*p)).chain([None; 3]).collect();
    assert_eq!(found.predictions, expected);
    assert_eq!(found.confusion.iter().flatten().sum::<usize>(), 9);
    assert_eq!(found.confusion.iter().enumerate().map(|(i, row)| row[i]).sum::<usize>(), 3);
    assert_eq!(found.labels, Some(vec!["no".into(), "maybe".into(), "yes".into()]));
    let error = classification(&llama(), &examples, &options(4), &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("`llama` cannot be used for classification"), "{error}");
    assert!(classification(&model, &[], &options(4), &mut |_, _| {}).unwrap_err().to_string().contains("nothing"));
}

#[test]
fn texts_of_a_pair_get_segment_types() {
    let model = classifier();
    // 7 separates.
    let rows: Vec<Vec<u32>> = (0..24u32).map(|i| vec![20 + i, 90 + 5 * i, 7, 255 - 3 * i, 60 + i, 7]).collect();
    let best = |types: Vec<u32>, row: &[u32]| {
        let mut input = TokenBatch::new(row.to_vec(), 1, row.len()).unwrap();
        input.token_types = Some(types);
        model.forward(&input, &Flow::eval()).unwrap().get(0).unwrap().argmax(0).unwrap().to_scalar::<u32>().unwrap()
    };
    let apart: Vec<_> = rows.iter().map(|row| Some(best(vec![0, 0, 0, 1, 1, 1], row))).collect();
    let alike: Vec<_> = rows.iter().map(|row| Some(best(vec![0; 6], row))).collect();
    assert_ne!(apart, alike);
    let examples: Vec<Example> = rows.iter().map(|row| example(row, |_| false, Some(0))).collect();
    let run = |separator| {
        let options = EvalOptions { batch_size: 5, separator };
        classification(&model, &examples, &options, &mut |_, _| {}).unwrap().predictions
    };
    assert_eq!(run(Some(7)), apart);
    assert_eq!(run(None), alike);
    assert_eq!(pair_separator(&model, &codec()), None);
}

#[test]
fn scores_that_are_not_finite_are_errors() {
    let mut model = llama();
    model
        .walk(&mut |module| {
            if let ModuleMut::Norm(norm) = module {
                let broken = Tensor::full(f32::NAN, norm.weight().get().shape(), &Device::Cpu)?;
                norm.weight_mut().replace(Some(broken));
            }
            Ok(())
        })
        .unwrap();
    let error = generate(&model, &codec(), &[vec![1, 2]], &GenerateOptions::default(), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("token 0 has NaN"), "{error}");
    assert!(error.hint().unwrap().contains("adapter"));
    let examples = [example(&[1, 2, 3], |_| true, None)];
    let error = perplexity(&model, &examples, &options(1), &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("token 2 at place 1 has the loss NaN"), "{error}");
}
