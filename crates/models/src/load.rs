//! Loading: a model folder, a GGUF file, or new random weights, each checked to use every tensor exactly once.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use espalier_adapters::Error as AdapterError;

use crate::config::{HeadSpec, ModelConfig};
use crate::source::folder::{FolderSource, WeightFiles};
use crate::source::random::RandomSource;
use crate::source::{LoadOptions, WeightSource, gguf};
use crate::transformer::Model;
use crate::{Error, Result};

/// Where a model's weights came from.
#[derive(Debug, Clone)]
pub struct Provenance {
    origin: Origin,
    hash: Arc<OnceLock<String>>,
}

#[derive(Debug, Clone)]
enum Origin {
    Folder(Arc<WeightFiles>),
    Gguf(PathBuf),
    Random(String),
}

impl Provenance {
    fn new(origin: Origin) -> Self {
        Self { origin, hash: Arc::new(OnceLock::new()) }
    }

    /// The folder or file, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match &self.origin {
            Origin::Folder(files) => Some(files.folder()),
            Origin::Gguf(path) => Some(path),
            Origin::Random(_) => None,
        }
    }

    /// Whether the weights come from a GGUF file, whose tensors are rounded.
    pub(crate) fn is_gguf(&self) -> bool {
        matches!(self.origin, Origin::Gguf(_))
    }

    /// Content hash of the weights as they were loaded, computed once.
    ///
    /// # Errors
    /// If the files cannot be read any more.
    pub fn hash(&self) -> espalier_adapters::Result<String> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash.clone());
        }
        let hash = match &self.origin {
            Origin::Folder(files) => files.hash().map_err(|e| AdapterError::format(files.folder(), e.to_string()))?,
            Origin::Gguf(path) => gguf::hash(path).map_err(|e| AdapterError::format(path, e.to_string()))?,
            Origin::Random(hash) => hash.clone(),
        };
        Ok(self.hash.get_or_init(|| hash).clone())
    }
}

impl Model {
    /// Loads a Hugging Face model folder or a `.gguf` file.
    ///
    /// # Errors
    /// If the architecture is not supported, a file is malformed, or tensors and architecture do not match one to one.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self> {
        let (config, mut source, provenance) = open_source(path)?;
        let model = Self::build(config, source.as_mut(), options, provenance)?;
        check_used(source.as_ref(), &model.config)?;
        Ok(model)
    }

    /// New random weights for an architecture (pre-training), from `options.seed`.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn random(config: ModelConfig, options: &LoadOptions) -> Result<Self> {
        let name = format!("random:{}:{}", options.seed, config.raw);
        let mut source = RandomSource::new(&config, options.seed);
        Self::build(config, &mut source, options, Provenance::new(Origin::Random(name)))
    }

    /// Where the weights came from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }
}

/// The architecture at `path` and its weights, which are not read yet.
pub(crate) fn open_source(path: &Path) -> Result<(ModelConfig, Box<dyn WeightSource>, Provenance)> {
    if path.is_file() && path.extension().is_some_and(|e| e == "gguf") {
        let (config, source) = gguf::open(path)?;
        return Ok((config, Box::new(source), Provenance::new(Origin::Gguf(path.to_owned()))));
    }
    if !path.is_dir() {
        return Err(Error::NotAModel { path: path.to_owned(), message: "no such model folder".into() });
    }
    let config = ModelConfig::read(path)?;
    let files = WeightFiles::open(path)?;
    let source = FolderSource::new(files.clone(), config.names.base);
    Ok((config, Box::new(source), Provenance::new(Origin::Folder(files))))
}

/// Every tensor of the source used, every one the architecture needs there.
pub(crate) fn check_used(source: &dyn WeightSource, config: &ModelConfig) -> Result<()> {
    let classifier = config.head != HeadSpec::Causal;
    // Heads of another task, which a classifier built on the same body leaves aside; and a tied head stored twice.
    let aside = |name: &String| {
        let other_task = ["cls.", "lm_head.", "qa_outputs.", config.names.head].iter().any(|p| name.starts_with(p));
        let pooler = ["pooler.dense.weight", "pooler.dense.bias"].iter().any(|p| name.ends_with(p));
        (classifier && (other_task || pooler)) || (config.tied && name == "lm_head.weight")
    };
    let unused: Vec<String> = source.unused().into_iter().filter(|n| !aside(n)).collect();
    if source.missing().is_empty() && unused.is_empty() {
        return Ok(());
    }
    let list = |names: &[String]| match names.len() {
        0 => "0".to_owned(),
        n if n <= 6 => format!("{n} ({})", names.join(", ")),
        n => format!("{n} ({}, ...)", names[..6].join(", ")),
    };
    Err(Error::Weights {
        path: source.path().to_owned(),
        family: config.family.clone(),
        missing: list(source.missing()),
        unused: list(&unused),
    })
}
