//! Generation against the plain way of doing it, and independence of the batch.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use candle_core::Tensor;
use common::{BOS, EOS, VOCAB, classifier, codec, llama, llama_with};
use espalier_adapters::Flow;
use espalier_data::{Message, TextCodec};
use espalier_infer::{
    ChatSession, Completion, Event, Finish, GenerateOptions, SamplingConfig, end_ids, generate, max_length, probe,
    prompt_ids,
};
use espalier_models::{Model, TokenBatch};
use serde_json::json;

fn prompts() -> Vec<Vec<u32>> {
    vec![
        vec![BOS, 40, 50, 60, 70, 80, 90],
        vec![5],
        vec![BOS, 200, 33, 12],
        vec![299, 298, 297, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
}

fn greedy(new: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens: new, ignore_eos: true, ..GenerateOptions::default() }
}

fn sampled(new: usize, seed: u64) -> GenerateOptions {
    let sampling = SamplingConfig { temperature: 1.0, top_p: Some(0.95), seed, ..SamplingConfig::default() };
    GenerateOptions { sampling, ..greedy(new) }
}

fn complete(model: &Model, codec: &TextCodec, prompts: &[Vec<u32>], options: &GenerateOptions) -> Vec<Completion> {
    generate(model, codec, prompts, options, &mut |_| {}).unwrap().completions
}

/// The most likely next token by a whole forward pass.
fn next(model: &Model, ids: &[u32]) -> u32 {
    let input = TokenBatch::new(ids.to_vec(), 1, ids.len()).unwrap();
    let logits: Tensor = model.forward(&input, &Flow::eval()).unwrap();
    let last = logits.get(0).unwrap().get(ids.len() - 1).unwrap();
    last.argmax(0).unwrap().to_scalar::<u32>().unwrap()
}

#[test]
fn greedy_with_cache_is_greedy_without() {
    let codec = codec();
    let families = [
        llama(),
        llama_with(json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5}), 3),
    ];
    for model in families {
        for (prompt, found) in prompts().iter().zip(complete(&model, &codec, &prompts(), &greedy(20))) {
            let mut ids = prompt.clone();
            for _ in 0..20 {
                ids.push(next(&model, &ids));
            }
            assert_eq!(found.ids, ids[prompt.len()..], "{}", model.config().family);
            assert_eq!((found.finish, found.prompt_tokens), (Finish::Length, prompt.len()));
        }
    }
}

#[test]
fn answers_do_not_depend_on_batch_mates() {
    let (model, codec) = (llama(), codec());
    for options in [greedy(16), sampled(16, 11)] {
        let together = complete(&model, &codec, &prompts(), &options);
        let apart = complete(&model, &codec, &prompts(), &GenerateOptions { batch_size: 1, ..options.clone() });
        let pairs = complete(&model, &codec, &prompts(), &GenerateOptions { batch_size: 3, ..options.clone() });
        assert_eq!(together, apart);
        assert_eq!(together, pairs);
        // Another second prompt leaves the others as they are.
        let mut other = prompts();
        other[1] = vec![9; 30];
        let changed = complete(&model, &codec, &other, &options);
        assert_eq!(changed[0], together[0]);
        assert_eq!(changed[2..], together[2..]);
        assert_ne!(changed[1], together[1]);
    }
}

#[test]
fn sequences_that_end_early_leave_the_others_alone() {
    let (model, codec) = (llama(), codec());
    let whole = complete(&model, &codec, &prompts(), &sampled(24, 2));
    // Tokens that occur in the answers at different places now end them.
    let eos = vec![whole[0].ids[3], whole[2].ids[9], whole[3].ids[0]];
    let options = GenerateOptions { eos: eos.clone(), ignore_eos: false, ..sampled(24, 2) };
    let cut = complete(&model, &codec, &prompts(), &options);
    let mut lengths = Vec::new();
    for (cut, whole) in cut.iter().zip(&whole) {
        let end = whole.ids.iter().position(|id| eos.contains(id)).map_or(whole.ids.len(), |at| at + 1);
        assert_eq!(cut.ids, whole.ids[..end]);
        assert_eq!(cut.finish, if end < 24 { Finish::Eos } else { cut.finish.clone() });
        lengths.push(end);
    }
    assert_eq!(lengths[3], 1);
    assert!(lengths.iter().any(|n| *n > 4), "{lengths:?}");
}

#[test]
fn seeds_reproduce_and_differ() {
    let (model, codec) = (llama(), codec());
    let same = vec![prompts()[0].clone(); 3];
    let first = complete(&model, &codec, &same, &sampled(16, 1));
    assert_eq!(first, complete(&model, &codec, &same, &sampled(16, 1)));
    assert_ne!(first, complete(&model, &codec, &same, &sampled(16, 2)));
    assert_ne!(first[0].ids, first[1].ids);
    assert_ne!(first[1].ids, first[2].ids);
}

#[test]
fn streamed_pieces_make_up_the_text() {
    let (model, codec) = (llama(), codec());
    for seed in 0..6 {
        let mut streamed = vec![(Vec::new(), String::new()); 4];
        let mut on_event = |event: Event| {
            streamed[event.sequence].0.push(event.token);
            streamed[event.sequence].1.push_str(&event.text);
        };
        let stop = vec!["a".to_string(), "q?".into()];
        let options = GenerateOptions { stop, eos: vec![EOS], ignore_eos: false, ..sampled(40, seed) };
        let made = generate(&model, &codec, &prompts(), &options, &mut on_event).unwrap();
        for (completion, (ids, text)) in made.completions.iter().zip(&streamed) {
            assert_eq!((&completion.ids, &completion.text), (ids, text));
            let whole = codec.decode(&completion.ids, true).unwrap();
            match &completion.finish {
                Finish::Stop(stop) => {
                    let at = completion.text.len();
                    assert!(whole[at..].starts_with(stop.as_str()), "{whole:?} at {at}");
                    assert!(!completion.text.contains(stop.as_str()));
                }
                _ => assert_eq!(completion.text, whole),
            }
        }
        assert_eq!(made.stats.decode_tokens, streamed.iter().map(|(ids, _)| ids.len()).sum::<usize>());
        assert_eq!(made.stats.prefill_tokens, prompts().iter().map(Vec::len).sum::<usize>());
        assert!(made.stats.prefill_s > 0.0 && made.stats.decode_s > 0.0);
    }
}

#[test]
fn a_stop_string_over_token_boundaries_is_cut_off() {
    let (model, codec) = (llama(), codec());
    let mut tried = 0;
    for seed in 0..20 {
        let whole = complete(&model, &codec, &prompts()[..1], &sampled(30, seed)).remove(0);
        for at in 4..whole.ids.len() - 2 {
            let stop = codec.decode(&whole.ids[at..at + 2], true).unwrap();
            let first = whole.text.find(&stop);
            let before = codec.decode(&whole.ids[..at], true).unwrap();
            let single = whole.ids.iter().any(|id| codec.decode(&[*id], true).unwrap() == stop);
            if stop.contains('\u{FFFD}') || stop.chars().count() < 2 || single || first != Some(before.len()) {
                continue;
            }
            let mut streamed = String::new();
            let options = GenerateOptions { stop: vec!["never there".into(), stop.clone()], ..sampled(30, seed) };
            let cut = generate(&model, &codec, &prompts()[..1], &options, &mut |e| streamed.push_str(&e.text)).unwrap();
            let cut = &cut.completions[0];
            assert_eq!((&cut.text, &cut.finish), (&before, &Finish::Stop(stop)));
            assert_eq!(streamed, before);
            assert_eq!(cut.ids, whole.ids[..at + 2]);
            tried += 1;
        }
    }
    assert!(tried >= 5, "only {tried} cases");
}

#[test]
fn limits_of_the_model_end_a_sequence() {
    let (model, codec) = (llama_with(json!({"max_position_embeddings": 12}), 3), codec());
    let made = complete(&model, &codec, &prompts(), &greedy(50));
    for (prompt, completion) in prompts().iter().zip(&made) {
        assert_eq!(completion.ids.len(), 12 - prompt.len());
        assert_eq!(completion.finish, Finish::Length);
    }
    let long = vec![vec![1], vec![7; 12]];
    let message = generate(&model, &codec, &long, &greedy(1), &mut |_| {}).unwrap_err().to_string();
    assert!(
        message.contains("prompt 1") && message.contains("12 tokens") && message.contains("12 positions"),
        "{message}"
    );
    let none = complete(&model, &codec, &prompts(), &greedy(0));
    assert!(none.iter().all(|c| c.ids.is_empty() && c.finish == Finish::Length));
    assert!(complete(&model, &codec, &[], &greedy(5)).is_empty());
}

#[test]
fn scaled_positions_go_beyond_the_first_limit() {
    let scaling = json!({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 12});
    let (model, codec) = (llama_with(scaling, 3), codec());
    assert_eq!(max_length(model.config()), 48);
    let together = complete(&model, &codec, &prompts(), &greedy(20));
    let alone = complete(&model, &codec, &prompts()[..1], &greedy(20));
    assert_eq!(together[0], alone[0]);
    assert_eq!(together[3].ids.len(), 20);
}

#[test]
fn an_empty_prompt_begins_at_the_beginning() {
    let (model, codec) = (llama(), codec());
    let made = complete(&model, &codec, &[vec![]], &greedy(5)).remove(0);
    assert_eq!(made, complete(&model, &codec, &[vec![BOS]], &greedy(5)).remove(0));
    let model = llama_with(json!({"bos_token_id": null}), 3);
    let message = generate(&model, &codec, &[vec![]], &greedy(5), &mut |_| {}).unwrap_err().to_string();
    assert!(message.contains("prompt 0") && message.contains("empty"), "{message}");
}

#[test]
fn what_cannot_be_meant_is_named() {
    let (model, codec) = (llama(), codec());
    let fails = |prompt: Vec<u32>, options: GenerateOptions, part: &str| {
        let message = generate(&model, &codec, &[prompt], &options, &mut |_| {}).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    fails(vec![1, VOCAB as u32], greedy(1), "token 1 has id 300, outside the model's vocabulary of 300");
    fails(vec![1], GenerateOptions { stop: vec![String::new()], ..greedy(1) }, "stop string");
    fails(vec![1], GenerateOptions { batch_size: 0, ..greedy(1) }, "batch_size = 0");
    fails(
        vec![1],
        GenerateOptions { sampling: SamplingConfig { top_p: Some(2.0), ..SamplingConfig::greedy() }, ..greedy(1) },
        "top_p = 2",
    );
    let ids_only = TextCodec::ids_only(VOCAB);
    assert!(complete(&model, &ids_only, &[vec![1]], &greedy(3))[0].text.is_empty());
    let stop = GenerateOptions { stop: vec!["a".into()], ..greedy(1) };
    assert!(generate(&model, &ids_only, &[vec![1]], &stop, &mut |_| {}).unwrap_err().to_string().contains("tokenizer"));
    let message = generate(&classifier(), &codec, &[vec![1]], &greedy(1), &mut |_| {}).unwrap_err().to_string();
    assert!(message.contains("cannot generate"), "{message}");
}

#[test]
fn prompts_keep_the_first_special_token_and_lose_the_last() {
    let codec = codec();
    let ids = prompt_ids(&codec, "dad").unwrap();
    assert_eq!((ids.first(), ids.last() == Some(&EOS)), (Some(&BOS), false));
    assert_eq!(prompt_ids(&codec, "dad</s>").unwrap().last(), Some(&EOS));
    assert_eq!(end_ids(&llama(), &codec), [EOS]);
}

#[test]
fn a_conversation_grows_by_question_and_answer() {
    let (model, codec) = (llama(), codec());
    let options = GenerateOptions { eos: end_ids(&model, &codec), ..greedy(8) };
    let mut session = ChatSession::new(vec![Message::new("system", "Be kind.")]);
    let mut streamed = String::new();
    let reply = session.say(&model, &codec, "bad day", &options, &mut |t| streamed.push_str(t)).unwrap();
    assert_eq!(streamed, reply.completion.text);
    let roles: Vec<&str> = session.messages().iter().map(|m| m.role.as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant"]);
    assert_eq!(session.messages()[2].content, streamed);
    let prompt = codec.encode_text("<|system|>Be kind.</s><|user|>bad day</s><|assistant|>", false).unwrap();
    assert_eq!(complete(&model, &codec, &[prompt], &options)[0], reply.completion);
    // A question that cannot be answered leaves the conversation as it was.
    let before = session.clone();
    assert!(session.say(&model, &codec, &"x".repeat(500), &options, &mut |_| {}).is_err());
    assert_eq!(session, before);
    assert!(session.undo() && session.messages().len() == 1 && !session.undo());
    session.push(Message::new("user", "u"));
    session.clear();
    assert_eq!(session.messages().len(), 1);
    let bare = TextCodec::ids_only(VOCAB);
    assert!(session.say(&model, &bare, "x", &options, &mut |_| {}).unwrap_err().to_string().contains("chat template"));
}

#[test]
fn the_probe_gives_scores_of_every_token() {
    let model = llama();
    let rows = vec![vec![1, 2, 3], vec![4]];
    let scores = probe::logits(&model, &rows).unwrap();
    assert_eq!(scores.dims(), [2, 3, VOCAB]);
    let alone = probe::logits(&model, &rows[1..]).unwrap();
    let difference = (scores.get(1).unwrap().get(0).unwrap() - alone.get(0).unwrap().get(0).unwrap()).unwrap();
    assert!(difference.abs().unwrap().to_vec1::<f32>().unwrap().iter().all(|d| *d < 1e-5));
    assert_eq!(probe::logits(&classifier(), &rows).unwrap().dims(), [2, 3]);
    assert!(probe::logits(&model, &[vec![1], vec![]]).unwrap_err().to_string().contains("example 1"));
    assert!(probe::logits(&model, &[]).is_err());
    assert!(probe::logits(&model, &[vec![900]]).unwrap_err().to_string().contains("900"));
}
