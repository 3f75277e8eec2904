//! every row is used or counted under its reason.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use espalier_adapters::random::stream;
use espalier_data::{ChatTemplate, DataError, DataOptions, EncodeOptions, Source, TextCodec, TokenStore, Truncation};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::chat;
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-15",
    title: "Rows counted by reason",
    claim: "Where bad rows are passed over, rows read are rows used and rows refused, and the refusals counted under each reason \
            are those that were put in: broken JSON, text that is not UTF-8, rows that are no object, unknown keys, missing \
            keys, wrong types, templates that raise, tools that a template does not show, nothing to train, nothing left \
            after truncation, too long, ids outside the vocabulary, lists of unequal length. Where they are not, the first \
            bad row ends the reading with its file and line. Random mixes under each way of truncation.",
    unit: "mixes counted otherwise",
    bar: 0.0,
    bounded: 60,
    full: 2000,
    run,
};

/// Longest row in tokens; a token is a byte.
const MAX_LENGTH: usize = 120;

/// ChatML that refuses a role.
fn template() -> String {
    let chatml = espalier_data::shipped("chatml").unwrap_or_default();
    chatml.replacen(
        "{%- for message in messages %}",
        "{%- for message in messages %}{% if message.role == 'villain' %}{{ raise_exception('no villains') }}{% endif %}",
        1,
    )
}

/// Kinds of row: what is wrong with it, None for good ones.
const KINDS: [Option<&str>; 20] = [
    None,
    None,
    None,
    None,
    Some("invalid_json"),
    Some("not_utf8"),
    Some("not_an_object"),
    Some("unknown_keys"),
    Some("missing_key"),
    Some("wrong_type"),
    Some("chat_template"),
    Some("unsupported"),
    Some("no_trained_token"),
    Some("no_trained_token_after_truncation"),
    Some("too_long"),
    Some("token_id_out_of_range"),
    Some("length_mismatch"),
    Some("cut"),
    Some("blank"),
    Some("wrong_type"),
];

/// A row of `kind`, and under which reason it will be counted.
fn row(kind: Option<&'static str>, truncation: Truncation, rng: &mut ChaCha8Rng) -> (Vec<u8>, Option<&'static str>) {
    let word: String = (0..rng.random_range(1..9)).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect();
    let long = "x".repeat(MAX_LENGTH + rng.random_range(0..40));
    let user = json!({"role": "user", "content": word});
    let assistant = json!({"role": "assistant", "content": word});
    let refused_for_length = match truncation {
        Truncation::Drop | Truncation::Error => Some("too_long"),
        Truncation::Right | Truncation::Left => None,
    };
    let (value, reason) = match kind {
        None => {
            let good = [
                json!({"text": word}),
                json!({"prompt": word, "completion": " b"}),
                json!({"messages": [user, assistant]}),
                json!({"messages": [user, assistant, user, assistant], "id": 3}),
                json!({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}),
                json!({"instruction": word, "output": "c"}),
            ];
            (good[rng.random_range(0..good.len())].clone(), None)
        }
        Some("invalid_json") => {
            let bad = ["{\"text\": ", "text", "{\"text\": \"a\"} x", "{'text': 'a'}", "{\"text\": \"a\",}", "[1, 2"];
            return (bad[rng.random_range(0..bad.len())].as_bytes().to_vec(), kind);
        }
        Some("not_utf8") => return (b"{\"text\": \"\xff\xfe\"}".to_vec(), kind),
        Some("not_an_object") => {
            let bad = [json!([1]), json!("a"), json!(3), json!(null), json!(true)];
            (bad[rng.random_range(0..bad.len())].clone(), kind)
        }
        Some("unknown_keys") => (json!({"verse": word}), kind),
        Some("missing_key") => (json!({"text": word, "label": null}), kind),
        Some("wrong_type") => {
            let bad = [
                json!({"text": 3}),
                json!({"messages": [{"role": "user"}]}),
                json!({"messages": [{"role": 3, "content": "x"}]}),
                json!({"input_ids": ["a"]}),
                json!({"prompt": ["a"], "completion": "b"}),
            ];
            (bad[rng.random_range(0..bad.len())].clone(), kind)
        }
        Some("chat_template") => (json!({"messages": [{"role": "villain", "content": word}, assistant]}), kind),
        Some("unsupported") => (json!({"messages": [user, assistant], "tools": [{"name": "f"}]}), kind),
        Some("no_trained_token") => {
            let bad = [json!({"messages": [user]}), json!({"input_ids": [1, 2], "labels": [-100, -100]})];
            (bad[rng.random_range(0..bad.len())].clone(), kind)
        }
        // Cut on the right the answer is gone; cut on the left it is all there.
        Some("no_trained_token_after_truncation") => {
            let reason = if truncation == Truncation::Left { None } else { refused_for_length.or(kind) };
            (json!({"prompt": long, "completion": "b"}), reason)
        }
        Some("too_long" | "cut") => (json!({"text": long}), refused_for_length),
        Some("token_id_out_of_range") => (json!({"input_ids": [1, 999_999]}), kind),
        Some("length_mismatch") => (json!({"input_ids": [1, 2, 3], "labels": [1, 2]}), kind),
        _ => return (b"   ".to_vec(), Some("")),
    };
    (value.to_string().into_bytes(), reason)
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let mut rng = stream(15, "rows");
    let subject = chat::Subject { name: "chatml".into(), text: template(), stop: Some("<|im_end|>".into()) };
    let codec = TextCodec::from_folder(chat::bytes().folder(&subject, &scope.scratch.join("model"))?)?;
    let codec = codec.with_template(ChatTemplate::new(&subject.text, codec_names(&scope.scratch.join("model"))?)?);
    let path = scope.scratch.join("rows.jsonl");
    for n in 0..scope.least {
        let truncation = [Truncation::Right, Truncation::Left, Truncation::Drop, Truncation::Error][n as usize % 4];
        let options = EncodeOptions { max_length: Some(MAX_LENGTH), truncation, ..EncodeOptions::default() };
        let codec = codec.clone().with_options(options);
        let mut text = Vec::new();
        let mut expected: BTreeMap<String, u64> = BTreeMap::new();
        let (mut rows, mut first) = (0, None);
        for line in 1..=rng.random_range(1..120u64) {
            let kind = KINDS[rng.random_range(0..KINDS.len())];
            let (bytes, reason) = row(kind, truncation, &mut rng);
            text.extend(bytes);
            text.push(b'\n');
            match reason {
                // A blank line is no row.
                Some("") => continue,
                Some(reason) => {
                    *expected.entry(reason.into()).or_default() += 1;
                    tally.count(reason);
                    let passed = reason.starts_with("no_trained_token") || reason == "too_long" && truncation == Truncation::Drop;
                    first = first.or((!passed).then_some(line));
                }
                None => tally.count("used"),
            }
            rows += 1;
        }
        std::fs::write(&path, text)?;
        let name = format!("mix {n}, truncation {truncation:?}");
        let fault = counted(&path, &codec, rows, &expected).with_context(|| name.clone())?;
        tally.held(fault.as_ref().map_or(name.clone(), |fault| format!("{name}: {fault}")), fault.is_none());
        let stopped = TokenStore::build(&Source::open(&path, DataOptions::default())?, &codec, None);
        let held = match (first, &stopped) {
            (Some(line), Err(DataError::Row { location, .. })) => location.line == line,
            (Some(_), _) => false,
            (None, Ok(store)) => store.report().refused == expected,
            (None, Err(DataError::Empty { .. })) => expected.values().sum::<u64>() == rows,
            (None, Err(_)) => false,
        };
        tally.held(format!("{name}, not passed over: {first:?} against {:?}", stopped.err()), held);
    }
    Ok(())
}

fn codec_names(folder: &Path) -> Result<BTreeMap<String, String>> {
    Ok(TextCodec::from_folder(folder)?.specials().named.clone())
}

/// What is counted otherwise than put in.
fn counted(path: &Path, codec: &TextCodec, rows: u64, expected: &BTreeMap<String, u64>) -> Result<Option<String>> {
    let source = Source::open(path, DataOptions { skip_bad_rows: true, ..DataOptions::default() })?;
    let refused: u64 = expected.values().sum();
    let report = match TokenStore::build(&source, codec, None) {
        Ok(store) => store.report().clone(),
        Err(DataError::Empty { rows: read, .. }) => {
            return Ok((read != rows || refused != rows).then(|| format!("{read} rows read and none used")));
        }
        Err(error) => return Err(error.into()),
    };
    let mut fault = String::new();
    if report.refused != *expected {
        write!(fault, "refused {:?}, put in {expected:?}; ", report.refused)?;
    }
    if report.rows != rows || report.used != rows - refused {
        write!(fault, "{} read and {} used of {rows} with {refused} bad", report.rows, report.used)?;
    }
    Ok((!fault.is_empty()).then_some(fault))
}
