//! Judges an adapter's files without the base they belong to: what they are, whether everything in them pairs up, and what to know.
//!
//! All faults are listed, not the first alone. In the end the adapter is attached to an outline made of its own shapes, by the same
//! walk that attaches it to a model, so that what passes here fails on a base only where names or shapes are another model's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::folder::{self, AdapterFiles, BASE_HASH_KEY, CONFIG_FILE, WEIGHTS_FILE};
use super::outline::{Outline, module_of};
use super::{forms, safetensors, tied};
use crate::adapter::Reach;
use crate::attach::{Origin, attach};
use crate::config::AdapterConfig;
use crate::target::{Candidate, Kind, Pattern};
use crate::{Error, Result};

/// What was found in an adapter's files.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// The folder or file.
    pub path: PathBuf,
    /// The layout, in words.
    pub form: String,
    /// What wrote it, where it says so.
    pub tool: String,
    /// Method, where its settings were understood.
    pub method: Option<String>,
    /// Adapted modules.
    pub sites: usize,
    /// Rank -> number of modules that have it.
    pub ranks: BTreeMap<usize, usize>,
    /// Tensors of the weights file.
    pub tensors: usize,
    /// Their values.
    pub values: usize,
    /// Bytes of the files.
    pub bytes: u64,
    /// Modules whose product is zero, because its B is: they change nothing.
    pub zero_products: usize,
    /// What to know, though nothing is wrong with it.
    pub notes: Vec<String>,
    /// What is wrong.
    pub faults: Vec<String>,
}

impl Report {
    fn fault(&mut self, what: impl std::fmt::Display) {
        self.faults.push(what.to_string());
    }
}

/// Judges the adapter at `path`, a folder or file; `alpha` for layouts that hold none.
pub fn check(path: &Path, alpha: Option<f64>) -> Report {
    let form = forms::detect(path);
    let mut report = Report { path: path.to_owned(), form: form.to_string(), ..Report::default() };
    report.bytes = form.files(path).iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum();
    if let Some(reason) = form.refusal() {
        report.fault(reason);
        return report;
    }
    let found = match form {
        forms::Form::Peft => peft(path, &mut report),
        _ => forms::read(path, alpha).map(Some),
    };
    match found {
        Ok(Some(mut files)) => {
            narrow(&mut files, &mut report);
            if report.tool.is_empty() {
                report.tool = form.tool().to_owned();
                count(&files.tensors, &mut report);
            }
            report.method = Some(files.config.method.name().to_owned());
            let paired = files.config.method.tensors().is_empty();
            if paired {
                pairs(&files, &mut report)
            } else {
                named(&files, &mut report)
            }
            if paired
                && report.faults.is_empty()
                && let Err(error) = outlined(files)
            {
                report.fault(error);
            }
        }
        Ok(None) => {}
        Err(error) => report.fault(error),
    }
    report
}

fn count(tensors: &BTreeMap<String, Tensor>, report: &mut Report) {
    report.tensors = tensors.len();
    report.values = tensors.values().map(Tensor::elem_count).sum();
}

/// Reads a PEFT folder tensor by tensor, so that every fault of it is found; None where it cannot be judged further.
fn peft(path: &Path, report: &mut Report) -> Result<Option<AdapterFiles>> {
    let config = folder::read_config(path).map_err(|e| report.fault(e)).ok();
    let raw = std::fs::read_to_string(path.join(CONFIG_FILE)).unwrap_or_default();
    let version = serde_json::from_str::<serde_json::Value>(&raw).ok();
    let version = version.as_ref().and_then(|v| v.get("peft_version")?.as_str()).map(str::to_owned);
    let weights = path.join(WEIGHTS_FILE);
    let file = safetensors::TensorFile::open(&weights)?;
    report.tool = match (file.metadata().contains_key(BASE_HASH_KEY), version) {
        (true, _) => "Espalier".into(),
        (false, Some(version)) => format!("PEFT {version}"),
        (false, None) => "PEFT, or a tool that writes its files".into(),
    };
    for (key, dtype, shape) in file.entries() {
        report.tensors += 1;
        report.values += shape.iter().product::<usize>();
        match file.load(&key, &Device::Cpu) {
            Ok(t) if !t.dtype().is_float() => report.fault(format!("tensor `{key}` has dtype {dtype:?}")),
            Ok(t) => {
                if let Err(error) = folder::check_finite(&weights, &key, &t) {
                    report.fault(error);
                }
            }
            Err(error) => report.fault(error),
        }
        let reach = config.as_ref().map_or(Reach::Maps, |config| config.method.reach());
        if folder::name_of(&key, reach).is_none() {
            report.fault(format!("tensor `{key}` is not named as PEFT names them"));
        }
    }
    if config.is_none() || !report.faults.is_empty() {
        return Ok(None);
    }
    let files = folder::read(path)?;
    match &files.config.base_hash {
        Some(hash) => report.notes.push(format!("made for the base with {hash}")),
        None => report.notes.push("no hash of the base in the file: a base cannot be told from another one".into()),
    }
    if !files.copies.is_empty() {
        report.notes.push(format!("{} copies of base weights beside the adapter", files.copies.len()));
    }
    Ok(Some(files))
}

/// Takes out targets that name nothing in the file where exclusions or a choice of layers may have emptied them: what they name
/// is known with a base alone.
fn narrow(files: &mut AdapterFiles, report: &mut Report) {
    let targets = &mut files.config.targets;
    if targets.exclude_modules.is_none() && targets.layers_to_transform.is_none() {
        return;
    }
    let Pattern::Endings(names) = &mut targets.target_modules else { return };
    let named = |ending: &String| {
        let inside =
            |path: &str| path == ending || path.strip_suffix(ending.as_str()).is_some_and(|r| r.ends_with('.'));
        files.tensors.keys().any(|name| inside(module_of(name)))
    };
    let (kept, emptied): (Vec<_>, Vec<_>) = names.drain(..).partition(named);
    *names = kept;
    if !emptied.is_empty() {
        report.notes.push(format!("targets that the other settings leave no module of: {}", emptied.join(", ")));
    }
}

/// The ranks that the settings give the modules `paths`.
fn wanted_ranks(config: &AdapterConfig, paths: &[(String, bool)]) -> Result<BTreeMap<String, usize>> {
    let candidate = |(path, lookup): &(String, bool)| {
        let kind = if *lookup { Kind::Embedding } else { Kind::Linear };
        Candidate { path: path.clone(), kind, head: false }
    };
    let candidates: Vec<Candidate> = paths.iter().map(candidate).collect();
    let (rank, alpha) = config.method.rank_and_alpha();
    let placement = config.targets.place(&candidates, rank, alpha)?;
    Ok(placement.sites.into_iter().map(|s| (s.path, s.rank)).collect())
}

/// Whether every tensor has a name that the method gives, at a module that the settings name. Widths do not show in the tensors of
/// every method, so that shapes are judged with a base alone.
fn named(files: &AdapterFiles, report: &mut Report) {
    let own = files.config.method.tensors();
    let mut sites: Vec<(String, bool)> = Vec::new();
    for name in files.tensors.keys() {
        let path = module_of(name);
        let part = name.strip_prefix(path).unwrap_or(name).trim_start_matches('.');
        if own.contains(&part) {
            sites.push((path.to_owned(), false));
        } else if name.contains('.') && !["weight", "bias", "trainable_tokens_delta"].contains(&part) {
            report.fault(format!("tensor `{name}`: {} has none of that name", files.config.method.name()));
        }
    }
    sites.dedup();
    report.sites = sites.len();
    report.notes.push("shapes of this method's tensors are judged with the base alone".into());
    if sites.is_empty() {
        report.fault(format!("no module has a tensor of {}", files.config.method.name()));
        return;
    }
    match wanted_ranks(&files.config, &sites) {
        Err(error) => report.fault(error),
        Ok(wanted) => {
            for (path, _) in sites.iter().filter(|(path, _)| !wanted.contains_key(path)) {
                report.fault(format!("{path}: adapted in the file, but no target of the settings"));
            }
        }
    }
}

/// Whether every A has its B, of one rank, the one that the settings say.
fn pairs(files: &AdapterFiles, report: &mut Report) {
    let mut found: Vec<(String, bool)> = Vec::new();
    let mut ranks = BTreeMap::new();
    for (a, b, lookup) in [("lora_A.weight", "lora_B.weight", false), ("lora_embedding_A", "lora_embedding_B", true)] {
        let ends = |name: &&String| name.ends_with(&format!(".{a}")) || name.ends_with(&format!(".{b}"));
        let mut paths: Vec<&str> = files.tensors.keys().filter(ends).map(|name| module_of(name)).collect();
        paths.dedup();
        for path in paths {
            let [first, second] = [a, b].map(|part| files.tensors.get(&format!("{path}.{part}")));
            let (Some(first), Some(second)) = (first, second) else {
                let absent = if first.is_none() { a } else { b };
                report.fault(format!("{path}: `{absent}` is missing, though the other factor is there"));
                continue;
            };
            let (&[rank, _], &[_, other]) = (first.dims(), second.dims()) else {
                report.fault(format!("{path}: factors of shapes {:?} and {:?}", first.dims(), second.dims()));
                continue;
            };
            if rank != other {
                report.fault(format!("{path}: A has rank {rank}, B has rank {other}"));
                continue;
            }
            if is_zero(second) || is_zero(first) {
                report.zero_products += 1;
            }
            *report.ranks.entry(rank).or_insert(0) += 1;
            ranks.insert(path.to_owned(), rank);
            found.push((path.to_owned(), lookup));
        }
    }
    report.sites = found.len();
    if report.zero_products > 0 {
        report.notes.push(format!("{} of {} modules have a product of zero", report.zero_products, report.sites));
    }
    // The settings of other layouts are made from the tensors; and a tied head has no target of its own.
    let head = |path: &str| files.config.tie_weights && !path.contains('.');
    found.retain(|(path, _)| !head(path));
    if found.is_empty() || !report.faults.is_empty() {
        return;
    }
    match wanted_ranks(&files.config, &found) {
        Err(error) => report.fault(error),
        Ok(wanted) => {
            for (path, _) in &found {
                match wanted.get(path) {
                    None => report.fault(format!("{path}: adapted in the file, but no target of the settings")),
                    Some(rank) if *rank != ranks[path] => {
                        report.fault(format!("{path}: the settings say rank {rank}, the tensors have {}", ranks[path]));
                    }
                    Some(_) => {}
                }
            }
        }
    }
}

fn is_zero(t: &Tensor) -> bool {
    let most = |t: &Tensor| t.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    most(t).is_ok_and(|m| m == 0.0)
}

/// Attaches the adapter to an outline of itself.
fn outlined(files: AdapterFiles) -> Result<()> {
    // Starts that take a part of the base would decompose weights that are not there.
    if files.config.method.portable().is_some() {
        return Ok(());
    }
    let AdapterFiles { path, config, mut tensors, .. } = files;
    let mut outline = Outline::of(&config, &tensors)?;
    if config.tie_weights {
        tied::take(&outline, &path, &config, &mut tensors)?;
    }
    let origin = Origin::File { path: &path, tensors };
    attach(&mut outline, &config, origin, DType::F32, &Device::Cpu).map(|_| ()).map_err(|e| match e {
        Error::NoTarget { key, pattern, .. } => Error::config(key, format!("`{pattern}` names nothing in the file")),
        other => other,
    })
}
