//! What each target does with its bytes.

use std::cell::RefCell;
use std::path::Path;

use candle_core::{DType, Device};
use espalier_adapters::formats::folder::{self, CONFIG_FILE, WEIGHTS_FILE};
use espalier_adapters::formats::{check, safetensors::TensorFile};
use espalier_data::{ChatTemplate, DataOptions, EncodeOptions, Message, Source, TextCodec, TokenStore};
use espalier_models::{LoadOptions, Model, ModelConfig};
use espalier_train::Recipe;

use crate::{chat, root};

/// Files of one thread, and what takes long to make.
struct Bench {
    folder: tempfile::TempDir,
    codec: Option<TextCodec>,
    model: Option<Model>,
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

/// Calls `act` with the thread's bench. Where none can be made there is nothing to try.
fn with_bench(act: impl FnOnce(&mut Bench)) {
    BENCH.with(|cell| {
        // A bench that an earlier input left in the middle of something is made anew.
        let Some(mut bench) = cell.take().or_else(Bench::new) else { return };
        act(&mut bench);
        cell.replace(Some(bench));
    });
}

impl Bench {
    fn new() -> Option<Self> {
        Some(Self { folder: tempfile::tempdir().ok()?, codec: None, model: None })
    }

    /// Calls `act` with the path of a file of these bytes.
    fn file(&self, name: &str, bytes: &[u8], act: impl FnOnce(&Path)) {
        let path = self.folder.path().join(name);
        if std::fs::write(&path, bytes).is_ok() {
            act(&path);
            let _ = std::fs::remove_file(&path);
        }
    }

    fn codec(&mut self) -> Option<&TextCodec> {
        if self.codec.is_none() {
            let text = espalier_data::shipped("chatml")?.to_owned();
            let subject = chat::Subject { name: "chatml".into(), text, stop: Some("<|im_end|>".into()) };
            let folder = chat::bytes().folder(&subject, &self.folder.path().join("model")).ok()?;
            let options = EncodeOptions { max_length: Some(64), ..EncodeOptions::default() };
            self.codec = Some(TextCodec::from_folder(folder).ok()?.with_options(options));
        }
        self.codec.as_ref()
    }
}

/// A safetensors file: its header, every tensor, its metadata.
pub(super) fn safetensors(bytes: &[u8]) {
    with_bench(|bench| {
        bench.file("a.safetensors", bytes, |path| {
            if let Ok(file) = TensorFile::open(path) {
                let _ = (file.entries(), file.metadata().len(), file.load_all(&Device::Cpu));
            }
        });
    });
}

/// An `adapter_config.json` beside the weights of a golden adapter, read, checked, and attached to the adapter's base.
pub(super) fn adapter_config(bytes: &[u8]) {
    with_bench(|bench| {
        let golden = root().join("parity/golden");
        if bench.model.is_none() {
            bench.model = Model::load(&golden.join("families/llama1"), &LoadOptions::cpu()).ok();
        }
        let weights = bench.folder.path().join(WEIGHTS_FILE);
        if !weights.exists() && std::fs::copy(golden.join("adapters/lora_all").join(WEIGHTS_FILE), &weights).is_err() {
            return;
        }
        let folder = bench.folder.path().to_owned();
        if std::fs::write(folder.join(CONFIG_FILE), bytes).is_err() {
            return;
        }
        let _ = (folder::read_config(&folder), check::check(&folder, None));
        if let (Some(model), Ok(files)) = (&mut bench.model, folder::read(&folder)) {
            let _ = folder::load(model, files, true, DType::F32, &Device::Cpu);
        }
    });
}

/// A GGUF file: its header, its settings as a model's, and the model.
pub(super) fn gguf(bytes: &[u8]) {
    with_bench(|bench| {
        bench.file("a.gguf", bytes, |path| {
            let _ = espalier_adapters::formats::gguf::open(path);
            if ModelConfig::read(path).is_ok() {
                let _ = Model::load(path, &LoadOptions::cpu());
            }
        });
    });
}

/// A `tokenizer.json`: the codec of its folder, a text there and back.
pub(super) fn tokenizer(bytes: &[u8]) {
    with_bench(|bench| {
        bench.file("tokenizer.json", bytes, |path| {
            let Ok(codec) = TextCodec::from_folder(path.parent().unwrap_or(path)) else { return };
            for text in ["hello world", "", "Grüße, 世界! </s><|im_end|> \u{0}\n\t"] {
                if let Ok(ids) = codec.encode_text(text, true) {
                    let _ = codec.decode(&ids, false);
                }
            }
        });
    });
}

/// A chat template: compiled, and run over a conversation with and without spans.
pub(super) fn chat_template(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let specials = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(key, token)| (key.to_owned(), token.to_owned()));
    let Ok(template) = ChatTemplate::new(text, specials.into_iter().collect()) else { return };
    let messages =
        [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."), ("user", ""), ("assistant", "So.")];
    let messages = messages.map(|(role, text)| Message::new(role, text));
    let _ = template.render(&messages, None, false);
    let _ = template.render_text(&messages[..2], None, true);
    let _ = template.render_text(&[], Some(&serde_json::json!([{"name": "f"}])), true);
}

/// A recipe: parsed, its adapter read, and written out.
pub(super) fn recipe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(recipe) = Recipe::parse(text, "recipe") {
        let _ = (recipe.adapter_config(), recipe.to_toml());
    }
}

fn rows(name: &str, bytes: &[u8]) {
    with_bench(|bench| {
        let Some(codec) = bench.codec().cloned() else { return };
        bench.file(name, bytes, |path| {
            for skip_bad_rows in [true, false] {
                let options = DataOptions { skip_bad_rows, ..DataOptions::default() };
                if let Ok(source) = Source::open(path, options) {
                    let _ = TokenStore::build(&source, &codec, None);
                }
            }
        });
    });
}

/// Rows of JSON lines: read, encoded and counted.
pub(super) fn rows_jsonl(bytes: &[u8]) {
    rows("a.jsonl", bytes);
}

/// The same of a JSON list.
pub(super) fn rows_json(bytes: &[u8]) {
    rows("a.json", bytes);
}

/// The same of a table with commas.
pub(super) fn rows_csv(bytes: &[u8]) {
    rows("a.csv", bytes);
}

/// The same of Parquet.
pub(super) fn rows_parquet(bytes: &[u8]) {
    rows("a.parquet", bytes);
}
