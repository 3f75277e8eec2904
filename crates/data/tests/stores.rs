//! Token stores: counts, refusals, cache keys, damaged files.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::{CHATML, codec, write};
use espalier_data::{
    ChatTemplate, DataError, DataOptions, EncodeOptions, Example, Source, SpecialTokens, TextCodec, TokenStore,
    cache_key,
};
use tempfile::TempDir;

fn source(folder: &Path, content: &str, skip: bool) -> Source {
    let path = write(folder, "a.jsonl", content);
    Source::open(path, DataOptions { skip_bad_rows: skip, ..Default::default() }).unwrap()
}

const MIXED: &str = "{\"text\": \"hello\"}\n{\"prompt\": \"a\", \"completion\": \"bc\"}\nbroken\n{\"nope\": 1}\n\
{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n{\"text\": \"abcdefghijklmnop\"}\n{\"input_ids\": [1, 9999]}\n\
{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}, {\"role\": \"assistant\", \"content\": \"y\"}]}\n";

#[test]
fn every_row_is_used_or_counted() {
    let folder = TempDir::new().unwrap();
    let codec = codec(Some(CHATML)).with_options(EncodeOptions { max_length: Some(14), ..Default::default() });
    let store = TokenStore::build(&source(folder.path(), MIXED, true), &codec, None);
    let store = store.unwrap();
    let report = store.report();
    assert_eq!((report.rows, report.used, store.len()), (8, 3, 3));
    let refused: Vec<(&str, u64)> = report.refused.iter().map(|(reason, n)| (reason.as_str(), *n)).collect();
    assert_eq!(
        refused,
        vec![
            ("invalid_json", 1),
            ("no_trained_token", 1),
            ("no_trained_token_after_truncation", 1),
            ("token_id_out_of_range", 1),
            ("unknown_keys", 1)
        ]
    );
    assert_eq!(report.rows, report.used + report.refused.values().sum::<u64>());
    assert!(report.first_errors[0].contains("a.jsonl:3: invalid JSON"), "{:?}", report.first_errors);
    assert_eq!(report.truncated, 1);
    assert_eq!(report.tokens as usize, store.lengths().sum::<usize>());
    let trained: usize = (0..store.len()).map(|at| store.get(at).unwrap().to_example().trained_tokens()).sum();
    assert_eq!(report.trained_tokens as usize, trained);
    let second = store.get(1).unwrap();
    assert_eq!((second.line, second.len(), second.trained_tokens), (2, 4, 3));
    assert!(second.file.ends_with("a.jsonl"));
    assert_eq!(store.get(2).unwrap().line, 6);
    let error = store.get(3).unwrap_err().to_string();
    assert!(error.contains("example 3 does not exist: there are 3"), "{error}");
}

#[test]
fn the_first_bad_row_stops_unless_skipped() {
    let folder = TempDir::new().unwrap();
    let error = TokenStore::build(&source(folder.path(), MIXED, false), &codec(Some(CHATML)), None).unwrap_err();
    assert!(matches!(error, DataError::Row { .. }));
    assert!(error.to_string().contains("a.jsonl:3: invalid JSON"), "{error}");
}

#[test]
fn nothing_usable_is_an_error_with_reasons() {
    let folder = TempDir::new().unwrap();
    for (content, says) in
        [("", "0 read"), ("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n", "no_trained_token 1")]
    {
        let error = TokenStore::build(&source(folder.path(), content, false), &codec(Some(CHATML)), None).unwrap_err();
        assert!(matches!(error, DataError::Empty { .. }));
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn a_truncated_list_is_an_error_even_when_bad_rows_are_skipped() {
    let folder = TempDir::new().unwrap();
    let path = write(folder.path(), "a.json", "[{\"text\": \"hello\"}, {\"text\": \"wor");
    let source = Source::open(path, DataOptions { skip_bad_rows: true, ..Default::default() }).unwrap();
    let error = TokenStore::build(&source, &codec(None), Some(folder.path())).unwrap_err().to_string();
    assert!(error.contains("truncated"), "{error}");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, vec!["a.json"], "no partial store is left behind");
}

#[test]
fn the_cache_is_used_and_repaired() {
    let folder = TempDir::new().unwrap();
    let cache = folder.path().join("cache");
    let codec = codec(Some(CHATML));
    let rows: String = (0..3000).map(|n| format!("{{\"text\": \"row {n} hello world\"}}\n")).collect();
    let source = source(folder.path(), &rows, false);
    let examples = |store: &TokenStore| -> Vec<Example> {
        (0..store.len()).map(|at| store.get(at).unwrap().to_example()).collect()
    };
    let memory = TokenStore::build(&source, &codec, None).unwrap();
    assert_eq!(memory.path(), None);
    let mut seen = Vec::new();
    let first = TokenStore::build_with(&source, &codec, Some(&cache), |rows| seen.push(rows)).unwrap();
    assert_eq!(seen.last(), Some(&3000));
    assert_eq!(examples(&first), examples(&memory));
    assert_eq!(first.key(), cache_key(&source, &codec).unwrap());
    let file = first.path().unwrap().to_path_buf();
    let again = TokenStore::build_with(&source, &codec, Some(&cache), |_| panic!("encoded again")).unwrap();
    assert_eq!((again.report(), examples(&again)), (first.report(), examples(&first)));
    drop((first, again));
    let whole = std::fs::read(&file).unwrap();
    for damage in [whole[..whole.len() / 2].to_vec(), whole[..20].to_vec(), Vec::new(), {
        let mut flipped = whole.clone();
        flipped[100] ^= 1;
        flipped
    }] {
        std::fs::write(&file, damage).unwrap();
        let error = TokenStore::open(&file).unwrap_err();
        assert!(matches!(error, DataError::Store { .. }), "{error}");
        let repaired = TokenStore::build(&source, &codec, Some(&cache)).unwrap();
        assert_eq!(examples(&repaired), examples(&memory));
        assert_eq!(std::fs::read(&file).unwrap(), whole, "the same bytes come out");
    }
}

#[test]
fn a_store_that_is_damaged_while_it_is_in_use_is_an_error() {
    let folder = TempDir::new().unwrap();
    let rows: String = (0..40).map(|n| format!("{{\"text\": \"row {n} hello world\"}}\n")).collect();
    let source = source(folder.path(), &rows, false);
    let store = TokenStore::build(&source, &codec(None), Some(folder.path())).unwrap();
    let file = store.path().unwrap().to_path_buf();
    let whole = std::fs::read(&file).unwrap();
    let damage = |bytes: &[u8]| {
        // In place: the map is of this file, not of one that takes its name.
        let mut open = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
        std::io::Write::write_all(&mut open, bytes).unwrap();
        open.set_len(bytes.len() as u64).unwrap();
    };
    let all = || (0..store.len()).map(|at| store.get(at).map(|_| ())).collect::<Vec<_>>();
    assert!(all().iter().all(Result::is_ok));
    let places: usize = (0..store.len()).map(|at| 8 * store.length(at)).sum();
    for at in (0..places + 40 * store.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        damage(&bytes);
        let faults: Vec<String> = all().into_iter().filter_map(Result::err).map(|e| e.to_string()).collect();
        assert!(!faults.is_empty() && faults.iter().all(|e| e.contains(".tokens")), "byte {at}: {faults:?}");
    }
    damage(&whole[..whole.len() / 2]);
    let faults: Vec<String> = all().into_iter().filter_map(Result::err).map(|e| e.to_string()).collect();
    assert!(faults.len() == store.len() && faults[0].contains("cut off while it was in use"), "{faults:?}");
    damage(&whole);
    assert!(all().iter().all(Result::is_ok));
}

#[test]
fn every_input_changes_the_key() {
    let folder = TempDir::new().unwrap();
    let content = "{\"text\": \"hello\"}\n";
    let base = || codec(Some(CHATML));
    let key = |source: &Source, codec: &TextCodec| cache_key(source, codec).unwrap();
    let original = key(&source(folder.path(), content, false), &base());
    assert_eq!(original, key(&source(folder.path(), content, false), &base()));
    let mut keys = vec![original];
    let with = |change: fn(&mut EncodeOptions)| {
        let mut options = EncodeOptions::default();
        change(&mut options);
        base().with_options(options)
    };
    let same = source(folder.path(), content, false);
    for codec in [
        with(|o| o.max_length = Some(9)),
        with(|o| o.completion_only = false),
        with(|o| o.add_eos = false),
        with(|o| o.truncation = espalier_data::Truncation::Drop),
        with(|o| o.label_names = Some(vec!["a".into()])),
        with(|o| o.apply_chat_template = true),
        base().with_template(ChatTemplate::new(&format!("{CHATML} "), common::names("</s>")).unwrap()),
        base().with_template(ChatTemplate::new(CHATML, common::names("<s>")).unwrap()),
        base().with_vocab_size(400),
        codec(None),
        {
            let tokenizer = common::tokenizer(&["</s>"]);
            let specials = base().specials().clone();
            let template = base().template().cloned();
            TextCodec::new(tokenizer, template, specials).unwrap().with_vocab_size(base().vocab_size())
        },
    ] {
        keys.push(key(&same, &codec));
    }
    keys.push(key(&source(folder.path(), content, true), &base()));
    keys.push(key(&source(folder.path(), "{\"text\": \"hellp\"}\n", false), &base()));
    keys.push(key(&source(folder.path(), "{\"text\": \"hello\"}\n\n", false), &base()));
    // A template that shows the date gives another text tomorrow.
    let dated = |clock: i64| {
        let mut template = ChatTemplate::new("{{ strftime_now('%d') }}", common::names("</s>")).unwrap();
        template.set_clock(clock);
        base().with_template(template)
    };
    keys.push(key(&same, &dated(0)));
    keys.push(key(&same, &dated(86_400)));
    let count = keys.len();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), count, "two keys are equal");
}

#[test]
fn missing_end_of_sequence_is_noted() {
    let folder = TempDir::new().unwrap();
    let tokenizer = common::tokenizer(&[]);
    let codec = TextCodec::new(tokenizer, None, Default::default()).unwrap();
    let store =
        TokenStore::build(&source(folder.path(), "{\"text\": \"hello world\"}\n", false), &codec, None).unwrap();
    assert!(store.report().notes[0].contains("no end-of-sequence token"));
}

#[test]
fn examples_with_unequal_lists_are_refused() {
    let bad = Example { input_ids: vec![1, 2], labels: vec![1], class: None, truncated: false };
    assert!(TokenStore::from_examples([bad]).unwrap_err().to_string().contains("2 ids and 1 labels"));
}

#[test]
fn answers_that_do_not_end_in_a_stop_token_are_counted() {
    let notes = |template: &str, options: EncodeOptions, content: &str| {
        let folder = TempDir::new().unwrap();
        let (tokenizer, names) = (common::tokenizer(&common::ALL), common::names("<|im_end|>"));
        let specials = SpecialTokens::named(&tokenizer, names.clone());
        let template = ChatTemplate::new(template, names).unwrap();
        let codec = TextCodec::new(tokenizer, Some(template), specials).unwrap().with_options(options);
        let store = TokenStore::build(&source(folder.path(), content, false), &codec, None).unwrap();
        store.report().notes.join("; ")
    };
    let turn = |text: &str| {
        format!("{{\"role\": \"user\", \"content\": \"x\"}}, {{\"role\": \"assistant\", \"content\": \"{text}\"}}")
    };
    let chat = format!("{{\"messages\": [{}]}}\n{{\"messages\": [{}, {}]}}\n", turn("y"), turn("a"), turn("b"));
    assert_eq!(notes(CHATML, EncodeOptions::default(), &chat), "");
    let left_out = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
        {% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}";
    let found = notes(left_out, EncodeOptions::default(), &chat);
    assert!(found.contains("2 of 2 answers do not end in a stop token") && found.contains("<|im_end|>"), "{found}");
    let cut = EncodeOptions { max_length: Some(30), ..Default::default() };
    let long = format!("{{\"messages\": [{}]}}\n", turn("abcdefghijklmnopqrstuvwxyz"));
    let found =
        notes(CHATML, EncodeOptions { truncation: espalier_data::Truncation::Right, ..cut }, &format!("{chat}{long}"));
    assert!(found.contains("1 of 3 answers") && found.contains("1 of them cut off"), "{found}");
    let bare = EncodeOptions { add_eos: false, ..Default::default() };
    let found = notes(CHATML, bare, "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"text\": \"c\"}\n");
    assert!(found.contains("1 of 1 answers"), "{found}");
}
