//! What writes results into folders beside runs, to be ended or failed at any instant: an adapter that replaces another, a model
//! merged into a folder, token stores, trained tokenizers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use espalier_adapters::AdapterSet;
use espalier_adapters::formats::{faults, folder};
use espalier_data::{DataOptions, Source, TextCodec, TokenStore, TokenizerOptions, train_tokenizer};
use espalier_models::{LoadOptions, Model};
use espalier_train::merge::{WriteOptions, merge_into_folder};
use espalier_train::verify::Probe;

use crate::runs;
use crate::subject::{self, Subject};

type Act = Box<dyn Fn(&Path) -> Result<()>>;

/// Something that writes into a folder.
pub(crate) struct Writer {
    pub(crate) name: &'static str,
    /// What is there before.
    pub(crate) before: Act,
    /// Writes the new.
    pub(crate) write: Act,
    /// The files of which the result is made; all, or none of it counts.
    files: Vec<&'static str>,
    /// Whether a reader takes the folder for a result.
    reads: fn(&Path) -> bool,
}

/// The result in a folder as bytes, if a reader takes it for one.
pub(crate) fn found(writer: &Writer, at: &Path) -> Option<Vec<Vec<u8>>> {
    if !(writer.reads)(at) {
        return None;
    }
    let mut names: Vec<PathBuf> = writer.files.iter().map(|name| at.join(name)).collect();
    if names.is_empty() {
        names = std::fs::read_dir(at).ok()?.flatten().map(|e| e.path()).collect();
        names.sort();
    }
    names.into_iter().map(|path| std::fs::read(path).ok()).collect()
}

/// The fault table of the adapters' files, for the files of data.
pub(crate) const TABLE: espalier_data::faults::Faults =
    espalier_data::faults::Faults { allowed: faults::allowed, instant: faults::instant };

/// All of them; what they work on lies in `scratch`.
pub(crate) fn all(scratch: &Path) -> Result<Vec<Writer>> {
    let (old, new) = two_subjects()?;
    let texts = scratch.join("texts.jsonl");
    std::fs::write(
        &texts,
        (0..60).map(|i| format!("{{\"text\": \"one {i} two {} three\"}}\n", i * 7)).collect::<String>(),
    )?;
    let ids = scratch.join("ids.jsonl");
    std::fs::write(&ids, runs::rows(40, 30)?)?;
    Ok(vec![adapter(old.clone(), new), merged(old), store(&ids)?, tokenizer(&texts)?])
}

/// Two examples of methods on one base.
fn two_subjects() -> Result<(Subject, Subject)> {
    let subjects = subject::all()?;
    let made: Vec<_> = subjects.into_iter().filter(|s| s.golden().is_none()).take(2).collect();
    <[Subject; 2]>::try_from(made).map(|[a, b]| (a, b)).map_err(|_| anyhow::anyhow!("too few examples of methods"))
}

/// An adapter in place of another.
fn adapter(old: Subject, new: Subject) -> Writer {
    Writer {
        name: "an adapter replaced",
        before: Box::new(move |at| old.files(at)),
        write: Box::new(move |at| {
            let mut model = new.model(&LoadOptions::cpu())?;
            let attached = new.attach(&mut model)?;
            folder::save(&mut model, &attached, at)?;
            Ok(())
        }),
        files: vec![folder::CONFIG_FILE, folder::WEIGHTS_FILE],
        reads: |at| folder::read(at).is_ok(),
    }
}

/// A merged model in place of another.
fn merged(subject: Subject) -> Writer {
    let subject = Arc::new(subject);
    let merge = |subject: &Subject, at: &Path, weight: f64| -> Result<()> {
        let mut model = subject.model(&LoadOptions::cpu())?;
        let attached = subject.attach(&mut model)?;
        let mut set = AdapterSet::new();
        set.add("a", attached)?;
        set.activate(&mut model, &[("a", weight)])?;
        let codec = TextCodec::ids_only(model.config().vocab);
        let probe = Probe::made(&model, &codec, &set)?;
        let options = WriteOptions::new(&model);
        merge_into_folder(&mut model, &mut set, at, &options, &probe)?;
        Ok(())
    };
    let other = subject.clone();
    Writer {
        name: "a model merged into a folder",
        before: Box::new(move |at| merge(&other, at, 0.5)),
        write: Box::new(move |at| merge(&subject, at, 1.0)),
        files: vec!["config.json", "model.safetensors"],
        reads: |at| Model::load(at, &LoadOptions::cpu()).is_ok(),
    }
}

/// Tokens kept for the next run.
fn store(ids: &Path) -> Result<Writer> {
    let source = Source::open(ids.display().to_string(), DataOptions::default())?;
    Ok(Writer {
        name: "a token store",
        before: Box::new(|at| Ok(std::fs::create_dir_all(at)?)),
        write: Box::new(move |at| {
            let codec = TextCodec::ids_only(64);
            espalier_data::faults::with(TABLE, || TokenStore::build(&source, &codec, Some(at)))?;
            Ok(())
        }),
        files: Vec::new(),
        reads: |at| {
            let files = std::fs::read_dir(at).into_iter().flatten().flatten().map(|e| e.path());
            let mut stores = files.filter(|path| path.extension().is_some_and(|e| e == "tokens"));
            stores.next().is_some_and(|path| TokenStore::open(path).is_ok())
        },
    })
}

/// A tokenizer in place of another.
fn tokenizer(texts: &Path) -> Result<Writer> {
    let open = || -> Result<Source> { Ok(Source::open(texts.display().to_string(), DataOptions::default())?) };
    let (first, second) = (open()?, open()?);
    let train = |source: &Source, at: &Path, more: usize| -> Result<()> {
        let template = (more > 0).then(|| "{{ messages }}".to_owned());
        let options = TokenizerOptions { vocab_size: 270 + more, chat_template: template };
        espalier_data::faults::with(TABLE, || train_tokenizer(source, &options, at))?;
        Ok(())
    };
    Ok(Writer {
        name: "a tokenizer trained",
        before: Box::new(move |at| train(&first, at, 0)),
        write: Box::new(move |at| train(&second, at, 6)),
        files: vec!["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
        reads: |at| at.join("tokenizer.json").is_file(),
    })
}
