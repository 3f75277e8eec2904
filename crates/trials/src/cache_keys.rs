//! whatever rows depend on is in the key of the token cache, and a damaged cache is not used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use espalier_adapters::random::stream;
use espalier_data::{DataOptions, EncodeOptions, Example, Source, TextCodec, TokenStore, cache_key};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::chat;
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-17",
    title: "Keys of the token cache",
    claim: "Whatever tokens depend on changes the key under which they are kept, so that they are made anew: a byte of a data \
            file, its kind, a byte of the chat template, every value that a tokenizer's description holds, special and stop \
            tokens, and every field of the options (found through serde, so that new fields are tried). No two changes \
            have one key. A kept file that was damaged (a byte changed, cut, lengthened, emptied, another's under this \
            name) is made anew and gives the same tokens, never others.",
    unit: "changes that were not noticed",
    bar: 0.0,
    bounded: 600,
    full: 8000,
    run,
};

const ROWS: &str = "{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}, {\"role\": \"assistant\", \"content\": \"world\"}]}\n\
{\"text\": \"some text\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"input_ids\": [1, 2, 3]}\n";

struct Bench<'a> {
    folder: PathBuf,
    data: PathBuf,
    codec: TextCodec,
    /// Which change has which key.
    keys: BTreeMap<String, String>,
    tally: &'a mut Tally,
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let mut rng = stream(17, "changes");
    let text = espalier_data::shipped("chatml").context("no ChatML")?;
    let subject = chat::Subject { name: "chatml".into(), text: text.into(), stop: Some("<|im_end|>".into()) };
    let folder = chat::bytes().folder(&subject, &scope.scratch.join("model"))?;
    let data = scope.scratch.join("rows.jsonl");
    std::fs::write(&data, ROWS)?;
    let codec = TextCodec::from_folder(&folder)?;
    let mut bench = Bench { folder, data, codec, keys: BTreeMap::new(), tally };
    let key = bench.key(&DataOptions::default())?;
    bench.keys.insert(key, "no change".into());
    let share = scope.least / 3;
    bench.options()?;
    bench.sources(&mut rng, share)?;
    bench.templates(&mut rng, share)?;
    bench.tokenizers(&mut rng, share)?;
    bench.damage(&mut rng, share, &scope.scratch.join("cache"))
}

impl Bench<'_> {
    fn key(&self, options: &DataOptions) -> Result<String> {
        Ok(cache_key(&Source::open(&self.data, options.clone())?, &self.codec)?)
    }

    /// A change gave `key`, which no other may have.
    fn changed(&mut self, kind: &str, what: String, key: String) {
        self.tally.count(kind);
        let before = self.keys.get(&key).cloned();
        // One change drawn twice is one change.
        let held = before.as_ref().is_none_or(|before| *before == what);
        self.tally.held(format!("{what}: as {before:?}"), held);
        self.keys.entry(key).or_insert(what);
    }

    fn options(&mut self) -> Result<()> {
        let (encode, data) = (self.codec.clone(), DataOptions::default());
        for (name, options) in variants(&EncodeOptions::default())? {
            let source = Source::open(&self.data, data.clone())?;
            let key = cache_key(&source, &encode.clone().with_options(options))?;
            self.changed("option", format!("encoding option {name}"), key);
        }
        for (name, options) in variants(&data)? {
            let key = self.key(&options)?;
            self.changed("option", format!("data option {name}"), key);
        }
        let source = Source::open(&self.data, data)?;
        let key = cache_key(&source, &encode.clone().with_vocab_size(encode.vocab_size() + 1))?;
        self.changed("option", "size of the vocabulary".into(), key);
        Ok(())
    }

    fn sources(&mut self, rng: &mut ChaCha8Rng, times: u64) -> Result<()> {
        let original = std::fs::read(&self.data)?;
        for _ in 0..times {
            let mut bytes = original.clone();
            let at = rng.random_range(0..bytes.len());
            let what = match rng.random_range(0..10) {
                0 => {
                    bytes.truncate(at);
                    format!("data cut to {at}")
                }
                1 => {
                    bytes.insert(at, b' ');
                    format!("data with a space at {at}")
                }
                _ => {
                    let by = rng.random_range(1..=255u8);
                    bytes[at] ^= by;
                    format!("data with byte {at} changed by {by}")
                }
            };
            // A space beside a space gives the same file.
            if bytes == original || what.contains("space") && self.keys.values().any(|known| *known == what) {
                continue;
            }
            let hash = format!("{what} ({:?})", bytes.len());
            std::fs::write(&self.data, &bytes)?;
            let key = self.key(&DataOptions::default())?;
            let what = if what.contains("space") { format!("data as {:?}", String::from_utf8_lossy(&bytes)) } else { hash };
            self.changed("source", what, key);
        }
        std::fs::write(&self.data, &original)?;
        let other = self.data.with_extension("json");
        std::fs::write(&other, &original)?;
        let key = cache_key(&Source::open(&other, DataOptions::default())?, &self.codec)?;
        self.changed("source", "another kind of file".into(), key);
        let both = Source::open_many(&[self.data.clone(), other], DataOptions::default())?;
        self.changed("source", "two files".into(), cache_key(&both, &self.codec)?);
        Ok(())
    }

    /// The key with the folder's files as they are now; None where they are refused.
    fn reloaded(&self) -> Result<Option<String>> {
        let Ok(codec) = TextCodec::from_folder(&self.folder) else { return Ok(None) };
        Ok(Some(cache_key(&Source::open(&self.data, DataOptions::default())?, &codec)?))
    }

    fn templates(&mut self, rng: &mut ChaCha8Rng, times: u64) -> Result<()> {
        let path = self.folder.join("chat_template.jinja");
        let original = std::fs::read(&path)?;
        for _ in 0..times {
            let mut bytes = original.clone();
            let at = rng.random_range(0..bytes.len());
            let to = rng.random_range(b' '..=b'~');
            if bytes[at] == to {
                continue;
            }
            bytes[at] = to;
            std::fs::write(&path, &bytes)?;
            match self.reloaded()? {
                Some(key) => self.changed("template", format!("template byte {at} is {to}"), key),
                None => self.tally.count("template refused"),
            }
        }
        Ok(std::fs::write(&path, &original)?)
    }

    fn tokenizers(&mut self, rng: &mut ChaCha8Rng, times: u64) -> Result<()> {
        for (file, times) in [("tokenizer.json", times), ("tokenizer_config.json", 20), ("generation_config.json", 20)] {
            let path = self.folder.join(file);
            let text = std::fs::read(&path)?;
            let original: Value = serde_json::from_slice(&text)?;
            let mut places = Vec::new();
            leaves(&original, String::new(), &mut places);
            for _ in 0..times {
                let place = &places[rng.random_range(0..places.len())];
                let mut changed = original.clone();
                let leaf = changed.pointer_mut(place).context("a leaf is gone")?;
                *leaf = match leaf.take() {
                    Value::Bool(b) => json!(!b),
                    Value::Number(n) => json!(n.as_u64().unwrap_or(0) + 1),
                    Value::String(s) => json!(s + "~"),
                    other => bail!("{place}: {other} is no leaf"),
                };
                std::fs::write(&path, changed.to_string())?;
                match self.reloaded()? {
                    Some(key) => self.changed("tokenizer", format!("{file} {place}"), key),
                    None => self.tally.count("tokenizer refused"),
                }
            }
            std::fs::write(&path, &text)?;
        }
        Ok(())
    }

    fn damage(&mut self, rng: &mut ChaCha8Rng, times: u64, cache: &Path) -> Result<()> {
        let source = Source::open(&self.data, DataOptions::default())?;
        let codec = self.codec.clone();
        let examples = |store: &TokenStore| -> Result<Vec<Example>> {
            (0..store.len()).map(|at| Ok(store.get(at)?.to_example())).collect()
        };
        let first = TokenStore::build(&source, &codec, Some(cache))?;
        let expected = examples(&first)?;
        let path = first.path().context("no file was kept")?.to_owned();
        let report = first.report().clone();
        drop(first);
        let whole = std::fs::read(&path)?;
        let other_codec = codec.clone().with_options(EncodeOptions { add_eos: false, ..EncodeOptions::default() });
        let other = TokenStore::build(&source, &other_codec, Some(cache))?;
        let other = std::fs::read(other.path().context("no file was kept")?)?;
        for n in 0..times {
            let mut bytes = whole.clone();
            let at = rng.random_range(0..bytes.len());
            let what = match n % 8 {
                0 => {
                    bytes.truncate(at);
                    format!("cut to {at}")
                }
                1 => {
                    bytes.push(rng.random());
                    "lengthened".into()
                }
                2 => {
                    bytes[at..].fill(0);
                    format!("zeros from {at}")
                }
                3 => {
                    bytes.clone_from(&other);
                    "another's".into()
                }
                _ => {
                    bytes[at] ^= 1 << rng.random_range(0..8);
                    format!("byte {at} changed")
                }
            };
            if bytes == whole {
                continue;
            }
            std::fs::write(&path, &bytes)?;
            let again = TokenStore::build(&source, &codec, Some(cache)).with_context(|| format!("kept file {what}"))?;
            let same = examples(&again)? == expected && *again.report() == report;
            drop(again);
            self.tally.held(format!("kept file {what}"), same && std::fs::read(&path)? == whole);
            self.tally.count("damaged cache");
        }
        let left = std::fs::read_dir(cache)?.count();
        self.tally.held(format!("{left} files in the cache folder"), left == 2);
        Ok(())
    }
}

/// Paths of the values that hold no others.
fn leaves(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, item) in map {
                leaves(item, format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), found);
            }
        }
        Value::Array(list) => list.iter().enumerate().for_each(|(i, item)| leaves(item, format!("{at}/{i}"), found)),
        Value::Null => {}
        _ => found.push(at),
    }
}

/// For each field of `options`, the options with another value of it. A field for which none is found is an error.
fn variants<T: Serialize + DeserializeOwned + PartialEq>(options: &T) -> Result<Vec<(String, T)>> {
    let Value::Object(fields) = serde_json::to_value(options)? else { bail!("options are no table") };
    let mut all = Vec::new();
    for (name, value) in &fields {
        let with = |value: Value| {
            let mut fields = fields.clone();
            fields.insert(name.clone(), value);
            serde_json::from_value::<T>(Value::Object(fields))
        };
        let mut candidates = vec![json!(true), json!(false), json!(7), json!("other"), json!(["other"])];
        if value.is_string()
            && let Err(error) = with(json!("no such value"))
        {
            // `unknown variant ..., expected one of `a`, `b``: the values there are.
            candidates.extend(error.to_string().split('`').map(|word| json!(word)));
        }
        let found: Vec<T> = candidates.into_iter().filter_map(|c| with(c).ok()).filter(|o| o != options).collect();
        if found.is_empty() {
            bail!("{name}: no other value was found");
        }
        all.extend(found.into_iter().enumerate().map(|(i, o)| (format!("{name}, value {i}"), o)));
    }
    Ok(all)
}
