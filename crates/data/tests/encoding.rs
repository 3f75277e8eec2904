//! Rows to ids and labels and back: boundaries, truncation, refusals, tokenizer folders, streaming.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod common;

use common::{CHATML, FIRST_SPECIAL, codec, tokenizer_json, trained_text, write};
use espalier_data::{EncodeOptions, Example, IGNORE, Label, Message, Row, TextCodec, Truncation, describe_example};
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

const EOS: u32 = FIRST_SPECIAL;
const BOS: u32 = FIRST_SPECIAL + 1;

fn pair(prompt: &str, completion: &str) -> Row {
    Row::PromptCompletion { prompt: prompt.into(), completion: completion.into() }
}

fn text(text: &str) -> Row {
    Row::Text { text: text.into() }
}

fn with(options: EncodeOptions) -> TextCodec {
    codec(Some(CHATML)).with_options(options)
}

#[test]
fn completions_are_trained_from_the_exact_boundary() {
    let codec = codec(None);
    let example = codec.encode(&pair("say:", " hello")).unwrap();
    assert_eq!(trained_text(&codec, &example), " hello</s>");
    assert_eq!(codec.decode(&example.input_ids, false).unwrap(), "say: hello</s>");
    assert_eq!(example.input_ids.last(), Some(&EOS));
    // " hello" is one token, which reaches from the prompt into the completion: it is trained.
    let example = codec.encode(&pair("say: ", "hello")).unwrap();
    assert_eq!(trained_text(&codec, &example), " hello</s>");
    // Multi-byte characters on both sides of the boundary.
    let example = codec.encode(&pair("世", "界")).unwrap();
    assert_eq!(trained_text(&codec, &example), "界</s>");
    let whole = with(EncodeOptions { completion_only: false, add_eos: false, ..Default::default() });
    let example = whole.encode(&pair("say:", " hello")).unwrap();
    assert_eq!(trained_text(&whole, &example), "say: hello");
}

#[test]
fn trimmed_offsets_keep_the_boundary() {
    let mut json = tokenizer_json(&["</s>"]);
    json["post_processor"]["trim_offsets"] = json!(true);
    let folder = TempDir::new().unwrap();
    write(folder.path(), "tokenizer.json", json.to_string());
    let codec = TextCodec::from_folder(folder.path()).unwrap();
    for (prompt, completion, trained) in [
        ("a  ", "hello", " hello</s>"),
        ("a  ", "b", "b</s>"),
        ("a", "  b", "  b</s>"),
        ("a ", "  \n", "  \n</s>"),
        ("a\n", "\n", "\n</s>"),
        ("a:", " ", " </s>"),
    ] {
        let example = codec.encode(&pair(prompt, completion)).unwrap();
        assert_eq!(trained_text(&codec, &example), trained, "{prompt:?} {completion:?}");
    }
}

#[test]
fn pairs_can_be_rendered_as_a_conversation() {
    let codec = with(EncodeOptions { apply_chat_template: true, ..Default::default() });
    let example = codec.encode(&pair("say\n\n", "hello")).unwrap();
    assert_eq!(
        codec.decode(&example.input_ids, false).unwrap(),
        "<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    );
    assert_eq!(trained_text(&codec, &example), "hello<|im_end|>");
}

#[test]
fn text_is_trained_whole_and_ends_with_eos_once() {
    let codec = codec(None);
    let example = codec.encode(&text("hello wo")).unwrap();
    assert_eq!(example.labels, example.input_ids.iter().map(|id| *id as i32).collect::<Vec<_>>());
    assert_eq!(example.input_ids.iter().filter(|id| **id == EOS).count(), 1);
    let example = codec.encode(&text("hello</s>")).unwrap();
    assert_eq!(example.input_ids.iter().filter(|id| **id == EOS).count(), 1);
}

#[test]
fn declared_bos_is_set_once() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), "tokenizer.json", tokenizer_json(&["</s>", "<s>"]).to_string());
    let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": true});
    write(folder.path(), "tokenizer_config.json", config.to_string());
    let codec = TextCodec::from_folder(folder.path()).unwrap();
    assert_eq!((codec.bos_id(), codec.eos_id(), codec.pad_id()), (Some(BOS), Some(EOS), EOS));
    for said in ["hello", "<s>hello"] {
        let example = codec.encode(&text(said)).unwrap();
        assert_eq!(example.input_ids.iter().filter(|id| **id == BOS).count(), 1);
        assert_eq!(example.input_ids.first(), Some(&BOS));
    }
    let example = codec.encode(&pair("a", "b")).unwrap();
    assert_eq!((example.input_ids.len(), example.labels[0], example.labels[1]), (4, IGNORE, IGNORE));
}

#[test]
fn truncation_cuts_refuses_or_drops() {
    let cut = with(EncodeOptions { max_length: Some(4), ..Default::default() });
    let example = cut.encode(&text("abcdefgh")).unwrap();
    assert_eq!((example.input_ids.len(), example.truncated), (4, true));
    assert!(!cut.encode(&text("abc")).unwrap().truncated);
    assert_eq!(cut.encode(&pair("abcdefgh", "x")).unwrap_err().reason(), "no_trained_token_after_truncation");
    let drop = with(EncodeOptions { max_length: Some(4), truncation: Truncation::Drop, ..Default::default() });
    let error = drop.encode(&text("abcdefgh")).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("9 tokens, more than max_length 4"), "{error}");
}

#[test]
fn rows_without_anything_to_train_are_refused() {
    let codec = codec(Some(CHATML)).with_options(EncodeOptions { add_eos: false, ..Default::default() });
    let silent = Row::Messages { messages: vec![Message::new("user", "hi")], tools: None };
    for row in [silent, pair("a", ""), text("a"), text("")] {
        let error = codec.encode(&row).unwrap_err();
        assert_eq!(error.reason(), "no_trained_token", "{row:?}");
        assert!(error.is_refusal());
    }
}

#[test]
fn ready_ids_pass_through_and_are_checked() {
    let codec = TextCodec::ids_only(10);
    let tokens = |ids: &[u32], labels: Option<Vec<i64>>, mask: Option<Vec<u8>>| {
        codec.encode(&Row::Tokens { input_ids: ids.to_vec(), labels, attention_mask: mask })
    };
    let example = tokens(&[1, 2, 3], Some(vec![-100, 2, 5]), None).unwrap();
    assert_eq!((example.input_ids, example.labels), (vec![1, 2, 3], vec![-100, 2, 5]));
    assert_eq!(tokens(&[1, 2, 3], None, None).unwrap().labels, vec![1, 2, 3]);
    assert_eq!(tokens(&[0, 0, 2, 3], None, Some(vec![0, 0, 1, 1])).unwrap().input_ids, vec![2, 3]);
    let error = tokens(&[1, 10], None, None).unwrap_err().to_string();
    assert!(error.contains("input_ids[1] = 10 is outside the vocabulary of 10"), "{error}");
    assert!(tokens(&[1, 2], Some(vec![-1, 2]), None).unwrap_err().to_string().contains("labels[0] = -1"));
    assert!(
        tokens(&[1, 2], Some(vec![2]), None)
            .unwrap_err()
            .to_string()
            .contains("labels has 1 entries where input_ids has 2")
    );
    assert_eq!(tokens(&[1, 2], Some(vec![5, -100]), None).unwrap_err().reason(), "no_trained_token");
    assert_eq!(codec.encode(&text("a")).unwrap_err().reason(), "no_tokenizer");
    assert_eq!(
        codec.encode(&Row::Messages { messages: vec![Message::new("user", "a")], tools: None }).unwrap_err().reason(),
        "no_chat_template"
    );
}

#[test]
fn classes_by_number_and_name() {
    let names = Some(vec!["neg".to_string(), "pos".to_string()]);
    let named = with(EncodeOptions { label_names: names, ..Default::default() });
    let class = |codec: &TextCodec, label: Label| {
        codec.encode(&Row::Classification { text: "ab".into(), text_pair: None, label })
    };
    assert_eq!(class(&named, Label::Name("pos".into())).unwrap().class, Some(1));
    assert_eq!(class(&named, Label::Name("0".into())).unwrap().class, Some(0));
    let error = class(&named, Label::Name("meh".into())).unwrap_err().to_string();
    assert!(error.contains("\"meh\" is not one of [neg, pos]"), "{error}");
    assert_eq!(class(&named, Label::Index(2)).unwrap_err().reason(), "unknown_label");
    let plain = codec(None);
    let example = class(&plain, Label::Index(7)).unwrap();
    assert_eq!((example.class, example.labels), (Some(7), vec![IGNORE; 2]));
    assert_eq!(class(&plain, Label::Name("pos".into())).unwrap_err().reason(), "unknown_label");
}

#[test]
fn pairs_keep_their_frame_when_truncated() {
    let mut json = tokenizer_json(&["[CLS]", "[SEP]"]);
    json["post_processor"] =
        json!({"type": "BertProcessing", "sep": ["[SEP]", FIRST_SPECIAL + 1], "cls": ["[CLS]", FIRST_SPECIAL]});
    let folder = TempDir::new().unwrap();
    write(folder.path(), "tokenizer.json", json.to_string());
    let codec = TextCodec::from_folder(folder.path()).unwrap();
    let row = |a: &str, b: Option<&str>| Row::Classification {
        text: a.into(),
        text_pair: b.map(str::to_string),
        label: Label::Index(0),
    };
    let shown = |max_length: usize, row: &Row| {
        let codec = codec.clone().with_options(EncodeOptions { max_length: Some(max_length), ..Default::default() });
        let example = codec.encode(row).unwrap();
        assert_eq!(example.truncated, example.input_ids.len() == max_length);
        codec.decode(&example.input_ids, false).unwrap()
    };
    assert_eq!(shown(99, &row("abc", Some("xyz"))), "[CLS]abc[SEP]xyz[SEP]");
    assert_eq!(shown(7, &row("abcdef", Some("xy"))), "[CLS]ab[SEP]xy[SEP]");
    assert_eq!(shown(8, &row("ab", Some("uvwxyz"))), "[CLS]ab[SEP]uvw[SEP]");
    assert_eq!(shown(5, &row("abcdef", None)), "[CLS]abc[SEP]");
}

#[test]
fn preferences_are_not_supervised_rows() {
    let row = Row::from_value(json!({"chosen": "a", "rejected": "b"}), &Default::default()).unwrap();
    assert_eq!(codec(None).encode(&row).unwrap_err().reason(), "unsupported");
}

#[test]
fn folders_without_tokenizer_say_what_they_hold() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), "config.json", "{}");
    let error = TextCodec::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("the folder has config.json"), "{error}");
    write(folder.path(), "tokenizer.json", "{\"version\":");
    let error = TextCodec::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json:1: "), "{error}");
    let mut json = tokenizer_json(&["</s>"]);
    json["added_tokens"][0]["id"] = json!(400);
    write(folder.path(), "tokenizer.json", json.to_string());
    let error = TextCodec::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("\"</s>\" is declared with id 400 but would get id 263"), "{error}");
}

#[test]
fn vocabulary_and_merges_make_a_tokenizer() {
    let folder = TempDir::new().unwrap();
    let json = tokenizer_json(&[]);
    let mut vocab = json["model"]["vocab"].clone();
    vocab["<|endoftext|>"] = json!(FIRST_SPECIAL);
    write(folder.path(), "vocab.json", vocab.to_string());
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()))
        .collect();
    write(folder.path(), "merges.txt", format!("#version: 0.2\n{}\n", merges.join("\n")));
    let codec = TextCodec::from_folder(folder.path()).unwrap();
    assert_eq!(codec.eos_id(), Some(FIRST_SPECIAL));
    let ids = codec.encode_text("hello world<|endoftext|>", true).unwrap();
    assert_eq!(
        ids,
        common::codec(None)
            .encode_text("hello world", true)
            .unwrap()
            .into_iter()
            .chain([FIRST_SPECIAL])
            .collect::<Vec<_>>()
    );
    assert_eq!(codec.decode(&ids, true).unwrap(), "hello world");
    write(folder.path(), "merges.txt", "#version: 0.2\nh e\nbroken\n");
    let error = TextCodec::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("merges.txt:3: expected two tokens"), "{error}");
}

#[test]
fn special_tokens_from_the_model_config() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), "tokenizer.json", tokenizer_json(&["</s>", "<|eot_id|>"]).to_string());
    write(folder.path(), "config.json", json!({"eos_token_id": [BOS, EOS], "bos_token_id": null}).to_string());
    let codec = TextCodec::from_folder(folder.path()).unwrap();
    assert_eq!((codec.eos_id(), codec.stop_ids()), (Some(BOS), vec![EOS, BOS]));
}

#[test]
fn views_show_what_is_trained() {
    let codec = codec(None);
    let example = codec.encode(&pair("a世", "b")).unwrap();
    let views = describe_example(&codec, &example);
    assert_eq!(views.len(), example.input_ids.len());
    let shown: Vec<(&str, bool)> = views.iter().map(|view| (view.text.as_str(), view.trained)).collect();
    assert_eq!(shown.first(), Some(&("a", false)));
    assert_eq!(&shown[shown.len() - 2..], &[("b", true), ("</s>", true)]);
    assert!(views.iter().all(|view| !view.text.is_empty()));
    let bare = TextCodec::ids_only(5);
    let views =
        describe_example(&bare, &Example { input_ids: vec![1], labels: vec![1], class: None, ..Example::default() });
    assert_eq!((views[0].text.as_str(), views[0].trained), ("<1>", false));
}

#[test]
fn broken_bytes_come_out_in_the_end() {
    let codec = codec(None);
    let ids = codec.encode_text("世", false).unwrap();
    let mut stream = codec.stream(true);
    assert_eq!(stream.push(ids[0]).unwrap(), None);
    assert_eq!(stream.finish().unwrap(), Some("\u{FFFD}".to_string()));
    let mut stream = codec.stream(true);
    let pieces: String = std::iter::repeat_n(ids[0], 100).filter_map(|id| stream.push(id).unwrap()).collect();
    assert!(!pieces.is_empty(), "broken bytes are not held back for ever");
}

#[test]
fn byte_fallback_streams_whole_characters() {
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        (0..256).map(|b| (format!("<0x{b:02X}>"), json!(b))).collect();
    vocab.insert("▁hello".into(), json!(256));
    vocab.insert("<unk>".into(), json!(257));
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [{"id": 258, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
    });
    let folder = TempDir::new().unwrap();
    write(folder.path(), "tokenizer.json", tokenizer.to_string());
    let codec = TextCodec::from_folder(folder.path()).unwrap();
    let mut ids = vec![258, 256, 256];
    ids.extend("世界é".bytes().map(u32::from));
    ids.extend([258, 256]);
    let mut stream = codec.stream(true);
    let mut pieces: Vec<String> = ids.iter().filter_map(|id| stream.push(*id).unwrap()).collect();
    pieces.extend(stream.finish().unwrap());
    assert_eq!(pieces.concat(), codec.decode(&ids, true).unwrap());
    assert_eq!(pieces, vec!["hello", " hello", "世", "界", "é", " hello"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn streamed_text_is_the_decoded_text(text in "\\PC{0,40}") {
        let codec = codec(None);
        let ids = codec.encode_text(&text, false).unwrap();
        let mut stream = codec.stream(false);
        let mut out = String::new();
        for id in &ids {
            if let Some(piece) = stream.push(*id).unwrap() {
                prop_assert!(!piece.contains(char::REPLACEMENT_CHARACTER) || text.contains(char::REPLACEMENT_CHARACTER));
                out.push_str(&piece);
            }
        }
        out.extend(stream.finish().unwrap());
        prop_assert_eq!(&out, &text);
        prop_assert_eq!(codec.decode(&ids, false).unwrap(), text);
    }

    #[test]
    fn completion_tokens_cover_the_completion(prompt in "\\PC{0,20}", completion in "\\PC{1,20}") {
        let codec = codec(None);
        let example = codec.encode(&pair(&prompt, &completion)).unwrap();
        let trained = trained_text(&codec, &example);
        let trained = trained.strip_suffix("</s>").unwrap();
        prop_assert!(trained.ends_with(&completion));
        // Of the prompt, at most what the one token on the boundary reaches back over: the longest has six bytes.
        prop_assert!(trained.len() - completion.len() < 6);
    }
}

#[test]
fn real_tokenizer_and_data() {
    let Some(data) = std::env::var_os("ESPALIER_DATA").map(std::path::PathBuf::from) else {
        eprintln!("skipped: ESPALIER_DATA is not set");
        return;
    };
    let folder = data.join("tokenizers/gpt2");
    if !folder.is_dir() {
        eprintln!("skipped: {} is absent", folder.display());
        return;
    }
    let codec = TextCodec::from_folder(&folder).unwrap();
    assert_eq!(codec.encode_text("Hello, my dog is cute", true).unwrap(), vec![15496, 11, 616, 3290, 318, 13779]);
    assert_eq!((codec.eos_id(), codec.vocab_size()), (Some(50256), 50257));
    // The two-file form of the same tokenizer gives the same ids.
    let two = TempDir::new().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        std::fs::copy(folder.join(name), two.path().join(name)).unwrap();
    }
    let other = TextCodec::from_folder(two.path()).unwrap();
    for (file, limit) in
        [("gsm8k/test.jsonl", 50), ("instruct/alpaca_zh_test.jsonl", 50), ("tinystories/valid.txt", 50)]
    {
        let path = data.join(file);
        if !path.is_file() {
            eprintln!("skipped: {} is absent", path.display());
            continue;
        }
        let options = espalier_data::DataOptions { limit: Some(limit), ..Default::default() };
        for row in espalier_data::Source::open(path, options).unwrap().rows() {
            let (location, row) = row.unwrap();
            let example = codec.encode(&row).unwrap_or_else(|e| panic!("{location}: {e}"));
            assert_eq!(example, other.encode(&row).unwrap(), "{location}");
            if let Row::PromptCompletion { completion, .. } = &row {
                assert!(trained_text(&codec, &example).ends_with(&format!("{completion}<|endoftext|>")), "{location}");
            }
        }
    }
}

#[test]
fn a_damaged_tokenizer_is_an_error_with_file_and_line() {
    let folder = TempDir::new().unwrap();
    let whole = tokenizer_json(&common::ALL).to_string();
    let long = json!({"type": "Replace", "pattern": {"Regex": " *"}, "content": "x".repeat(100)});
    let growing = json!({"type": "Sequence", "normalizers": [long, long]}).to_string();
    // Broken inside of the decoder, the library itself would end the process.
    for (text, says) in [
        (whole.replace("\"decoder\":{", "\"decoder\":{\"a\" 1,"), "tokenizer.json:1: invalid JSON"),
        (whole.replace("\"normalizer\":null", &format!("\"normalizer\":{growing}")), "10000 times as long"),
        (whole[..whole.len() / 2].to_owned(), "tokenizer.json:1: invalid JSON"),
        (whole.replace("\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"Nothing\""), "tokenizer.json"),
    ] {
        assert_ne!(text, whole);
        std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
        let error = TextCodec::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
