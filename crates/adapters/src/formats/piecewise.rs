//! Adapters that stay in their files and are put into a model module by module, so that neither they nor the model need be in
//! memory as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device};

use super::folder::{self, AdapterFiles, OpenFolder};
use super::forms::{self, Form};
use super::{base_mark, gguf_adapter};
use crate::adapter::Property;
use crate::attach::{Attached, BaseCheck};
use crate::config::{AdapterConfig, TokenIndices};
use crate::module::Host;
use crate::{AdapterSet, Error, Result};

/// Where the tensors of an adapter are.
#[derive(Debug)]
enum Held {
    File(OpenFolder),
    /// Layouts of low-rank factors alone, which are small.
    Memory(AdapterFiles),
}

/// An adapter in its files.
#[derive(Debug)]
pub struct Piece {
    /// Its name.
    pub name: String,
    /// The factor it acts with.
    pub weight: f64,
    /// What is known of its base.
    pub base: BaseCheck,
    held: Held,
    /// The module of each tensor.
    places: BTreeMap<String, String>,
}

/// Several of them that act together.
#[derive(Debug, Default)]
pub struct Piecewise {
    pieces: Vec<Piece>,
}

/// The module that a tensor belongs to, by its name.
fn module_in<'a>(name: &'a str, paths: &BTreeSet<String>) -> Option<&'a str> {
    let mut end = name.len();
    while let Some(dot) = name[..end].rfind('.') {
        if paths.contains(&name[..dot]) {
            return Some(&name[..dot]);
        }
        end = dot;
    }
    None
}

impl Piece {
    /// Opens the adapter of any layout at `path` for `host`, which need not be loaded; `alpha` for layouts that hold none.
    ///
    /// # Errors
    /// If the files are malformed, the base is another one (unless `allow_base`), a tensor belongs to no module, or the adapter is no
    /// change of weights.
    pub fn open(
        host: &mut dyn Host,
        (name, path, weight): (&str, &Path, f64),
        alpha: Option<f64>,
        allow_base: bool,
    ) -> Result<Self> {
        let held = match forms::detect(path) {
            Form::Peft if alpha.is_none() => Held::File(OpenFolder::open(path)?),
            _ => Held::Memory(gguf_adapter::resolve(host, forms::read(path, alpha)?)?),
        };
        let mut piece = Self { name: name.to_owned(), weight, base: BaseCheck::Same, held, places: BTreeMap::new() };
        if let Some(reason) = piece.config().method.exception(Property::Merge) {
            return Err(Error::unsupported(
                format!("{} put into the weights module by module", path.display()),
                reason,
            ));
        }
        piece.base = base_mark::check(host, piece.config(), path, allow_base)?;
        let mut paths = BTreeSet::new();
        host.walk(&mut |module| {
            paths.insert(module.path().to_owned());
            Ok(())
        })?;
        if host.tied_table().is_some() {
            paths.extend(host.head_paths());
        }
        let names: Vec<String> = match &piece.held {
            Held::File(file) => file.names().map(str::to_owned).collect(),
            Held::Memory(files) => files.tensors.keys().cloned().collect(),
        };
        let mut unused = Vec::new();
        for name in names {
            match module_in(&name, &paths).map(str::to_owned) {
                Some(module) => {
                    piece.places.insert(name, module);
                }
                // What all sites share has no module; whether it is taken is seen when a part is made.
                None if !name.contains('.') => {}
                None => unused.push(name),
            }
        }
        unused.extend(piece.copies().into_iter().filter(|name| module_in(name, &paths).is_none()));
        match unused.is_empty() {
            true => Ok(piece),
            false => Err(Error::Unpaired { path: path.to_owned(), missing: Vec::new(), unused }),
        }
    }

    /// Its settings.
    pub fn config(&self) -> &AdapterConfig {
        match &self.held {
            Held::File(file) => file.config(),
            Held::Memory(files) => &files.config,
        }
    }

    /// The tensors of the modules whose paths are `wanted`.
    fn files(&self, wanted: &dyn Fn(&str) -> bool) -> Result<AdapterFiles> {
        // A copy of a base weight belongs to the module it is named after.
        let at = |name: &str| match self.places.get(name) {
            Some(module) => wanted(module),
            None => name.strip_suffix(".weight").is_some_and(wanted),
        };
        match &self.held {
            Held::File(file) => file.read(&at),
            Held::Memory(files) => {
                let taken = |all: &BTreeMap<String, _>| {
                    all.iter()
                        .filter(|(name, _)| at(name) || !name.contains('.'))
                        .map(|(name, t): (&String, &candle_core::Tensor)| (name.clone(), t.clone()))
                        .collect()
                };
                Ok(AdapterFiles {
                    path: files.path.clone(),
                    config: files.config.clone(),
                    tensors: taken(&files.tensors),
                    copies: taken(&files.copies),
                    gguf: None,
                })
            }
        }
    }

    /// All of it, on `host`.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn attach(&self, host: &mut dyn Host, device: &Device) -> Result<Attached> {
        let all = |_: &str| true;
        let attached = folder::load_part(host, self.files(&all)?, &all, DType::F32, device)?;
        Ok(Attached { base: self.base, ..attached })
    }

    fn copies(&self) -> Vec<String> {
        match &self.held {
            Held::File(file) => file.copies().map(str::to_owned).collect(),
            Held::Memory(files) => files.copies.keys().cloned().collect(),
        }
    }

    /// Whether the base's weights are needed to make it: a part of them is in its start, or it brings copies to compare with.
    pub fn needs_base(&self) -> bool {
        self.config().method.portable().is_some() || !self.copies().is_empty()
    }
}

impl Piecewise {
    /// No adapters: the base alone.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one.
    ///
    /// # Errors
    /// If its name is taken.
    pub fn add(&mut self, piece: Piece) -> Result<()> {
        if self.pieces.iter().any(|other| other.name == piece.name) {
            return Err(Error::config("name", format!("an adapter named `{}` is already loaded", piece.name)));
        }
        self.pieces.push(piece);
        Ok(())
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether the base's weights must be in the modules before the adapters are made for them.
    pub fn needs_base(&self) -> bool {
        self.pieces.iter().any(Piece::needs_base)
    }

    /// Paths of the modules they act on.
    pub fn modules(&self) -> BTreeSet<&str> {
        self.pieces.iter().flat_map(|piece| piece.places.values().map(String::as_str)).collect()
    }

    /// Ids of the token rows they train.
    pub fn trained_tokens(&self) -> Vec<u32> {
        let mut ids = BTreeSet::new();
        for piece in &self.pieces {
            match &piece.config().trainable_tokens {
                None => {}
                Some(TokenIndices::Input(rows)) => ids.extend(rows),
                Some(TokenIndices::ByModule(map)) => ids.extend(map.values().flatten()),
            }
        }
        ids.into_iter().collect()
    }

    /// Puts what they have at the modules whose paths are `wanted` into the slots, and empties all other slots; parameters on
    /// `device`.
    ///
    /// # Errors
    /// If the adapters do not fit, or cannot act together.
    pub fn act(&self, host: &mut dyn Host, wanted: &dyn Fn(&str) -> bool, device: &Device) -> Result<()> {
        let (table, heads) = (host.tied_table(), host.head_paths());
        let part =
            |path: &str| wanted(path) || (heads.iter().any(|h| h == path) && table.as_deref().is_some_and(wanted));
        let mut set = AdapterSet::new();
        for piece in &self.pieces {
            let files = piece.files(&part)?;
            set.add(&piece.name, folder::load_part(host, files, &part, DType::F32, device)?)?;
        }
        let all: Vec<(&str, f64)> = self.pieces.iter().map(|p| (p.name.as_str(), p.weight)).collect();
        set.activate(host, &all)
    }

    /// Empties all slots.
    ///
    /// # Errors
    /// If the walk fails.
    pub fn rest(&self, host: &mut dyn Host) -> Result<()> {
        AdapterSet::new().disable(host)
    }

    /// Rows of the tensor called `name` in any of them.
    pub fn rows_of(&self, name: &str) -> Option<usize> {
        self.pieces.iter().find_map(|piece| match &piece.held {
            Held::File(file) => file.shape(name)?.first().copied(),
            Held::Memory(files) => files.tensors.get(name)?.dims().first().copied(),
        })
    }
}
