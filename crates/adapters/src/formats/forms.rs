//! The layouts that adapters come in, told apart by what the files hold, and read as one.

use std::fmt;
use std::path::{Path, PathBuf};

use super::folder::{self, AdapterFiles, BASE_HASH_KEY, CONFIG_FILE, Saved, WEIGHTS_FILE};
use super::{gguf_adapter, loralib, mlx, safetensors};
use crate::attach::Attached;
use crate::module::Host;
use crate::{Error, Result};

/// A layout of adapter files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// PEFT's folder, ours too.
    Peft,
    /// The folder of mlx-lm.
    Mlx,
    /// The GGUF file of llama.cpp.
    Gguf,
    /// Bare low-rank factors of Microsoft's loralib in one file.
    Loralib,
    /// A PEFT folder whose weights are a Python pickle.
    Pickle,
    /// Factors of a diffusion model by their place in a walk (cloneofsimo/lora).
    Cloneofsimo,
    /// Factors of a diffusion model by flattened names (kohya).
    Kohya,
    /// Nothing that is known here.
    Unknown,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peft => "PEFT folder",
            Self::Mlx => "mlx-lm folder",
            Self::Gguf => "adapter of llama.cpp",
            Self::Loralib => "loralib file",
            Self::Pickle => "PEFT folder with pickled weights",
            Self::Cloneofsimo => "image-model adapter of cloneofsimo/lora",
            Self::Kohya => "image-model adapter of kohya's scripts",
            Self::Unknown => "unknown layout",
        })
    }
}

impl Form {
    /// The tool behind a layout that does not name it.
    pub(super) fn tool(self) -> &'static str {
        match self {
            Self::Loralib => "loralib",
            Self::Mlx => "mlx-lm",
            Self::Gguf => "llama.cpp's converter",
            _ => "unknown",
        }
    }

    /// Why adapters of this layout are not read, where they are not.
    pub fn refusal(self) -> Option<&'static str> {
        match self {
            Self::Peft | Self::Mlx | Self::Gguf | Self::Loralib => None,
            Self::Pickle => Some(
                "the weights are a Python pickle (adapter_model.bin), which can run code and is not read here; convert it where you \
                 trust it: python -c \"import torch, safetensors.torch as s; \
                 s.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\"",
            ),
            Self::Cloneofsimo => {
                Some("its tensors are numbered by a walk over an image model, and image models are not read here")
            }
            Self::Kohya => Some("its tensors belong to an image model, and image models are not read here"),
            Self::Unknown => Some(
                "neither a PEFT folder (adapter_config.json and adapter_model.safetensors) nor a file of low-rank factors; \
                 where a folder holds such a file, name the file itself",
            ),
        }
    }

    /// Names of the files in a folder of this layout.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Peft => &[WEIGHTS_FILE, CONFIG_FILE],
            Self::Mlx => &[mlx::WEIGHTS_FILE, CONFIG_FILE],
            _ => &[],
        }
    }

    /// The files of an adapter at `path`.
    pub(super) fn files(self, path: &Path) -> Vec<PathBuf> {
        match self {
            Self::Peft | Self::Mlx => self.names().iter().map(|name| path.join(name)).collect(),
            _ if path.is_dir() => Vec::new(),
            _ => vec![path.to_owned()],
        }
    }
}

/// The layout of what is at `path`.
pub fn detect(path: &Path) -> Form {
    if path.is_dir() {
        if path.join(mlx::WEIGHTS_FILE).is_file() && !path.join(WEIGHTS_FILE).is_file() {
            return Form::Mlx;
        }
        return match (path.join(WEIGHTS_FILE).is_file(), path.join("adapter_model.bin").is_file()) {
            (true, _) => Form::Peft,
            (false, true) => Form::Pickle,
            (false, false) if path.join(CONFIG_FILE).is_file() => Form::Peft,
            _ => Form::Unknown,
        };
    }
    if gguf_adapter::is_adapter(path) {
        return Form::Gguf;
    }
    let Ok(file) = safetensors::TensorFile::open(path) else { return Form::Unknown };
    let entries = file.entries();
    let any = |test: &dyn Fn(&str) -> bool| entries.iter().any(|(name, ..)| test(name));
    if any(&|n| n.ends_with(".lora_A")) && any(&|n| n.ends_with(".lora_B")) {
        Form::Loralib
    } else if any(&|n| n.starts_with("unet:") || n.starts_with("text_encoder:")) {
        Form::Cloneofsimo
    } else if any(&|n| n.ends_with(".lora_down.weight")) {
        Form::Kohya
    } else {
        Form::Unknown
    }
}

/// Reads an adapter of any layout; `alpha` for layouts that hold none.
///
/// # Errors
/// If the layout is not read here, a file is malformed, or `alpha` is missing or has no use.
pub fn read(path: &Path, alpha: Option<f64>) -> Result<AdapterFiles> {
    let form = detect(path);
    if let Some(alpha) = alpha.filter(|_| form != Form::Loralib) {
        return Err(Error::config("alpha", format!("{alpha} was given, but a {form} holds its own")));
    }
    match (form, form.refusal()) {
        (Form::Mlx, _) => mlx::read(path),
        (Form::Gguf, _) => gguf_adapter::read(path),
        (Form::Loralib, _) => loralib::read(path, alpha),
        (Form::Peft, _) => folder::read(path),
        (_, Some(reason)) => Err(Error::format(path, reason)),
        (_, None) => Err(Error::format(path, "this layout is not read")),
    }
}

/// Writes an adapter in a layout, into a folder (created if absent; other files stay), or as the one file that the layout has.
///
/// # Errors
/// If the layout cannot hold it or is not written here, or a file cannot be written.
pub fn save(form: Form, host: &mut dyn Host, adapter: &Attached, folder: &Path) -> Result<Saved> {
    match form {
        Form::Peft => folder::save(host, adapter, folder),
        Form::Mlx => mlx::save(host, adapter, folder),
        Form::Gguf => gguf_adapter::save(host, adapter, folder),
        other => Err(Error::unsupported(format!("writing a {other}"), "save the adapter as a PEFT folder")),
    }
}

/// Whether an adapter of layout `form` may be written into `folder`: not into its base, and not over an adapter that was not
/// written here.
///
/// # Errors
/// If it may not.
pub fn claim(form: Form, folder: &Path, base: Option<&Path>) -> Result<()> {
    if form == Form::Gguf {
        let other = folder.exists() && !gguf_adapter::is_adapter(folder);
        return match other {
            true => Err(Error::format(folder, "something that is no adapter is there; name another file")),
            false => Ok(()),
        };
    }
    let real = |p: &Path| p.canonicalize().ok();
    if base.and_then(real).is_some_and(|base| real(folder) == Some(base)) {
        return Err(Error::format(folder, "this is the base model itself; name another folder for the adapter"));
    }
    let mut weights = [WEIGHTS_FILE, mlx::WEIGHTS_FILE].into_iter().filter(|name| folder.join(name).exists());
    let (first, more) = (weights.next(), weights.next());
    let config = folder.join(CONFIG_FILE).exists();
    if first.is_none() && !config {
        return Ok(());
    }
    // The settings file has one name in both layouts.
    let same = more.is_none() && first == form.names().first().copied();
    let marked = |name: &str| {
        let file = safetensors::TensorFile::open(&folder.join(name));
        file.is_ok_and(|f| f.metadata().contains_key(BASE_HASH_KEY))
    };
    match same && first.is_some_and(marked) {
        true => Ok(()),
        false => Err(Error::format(folder, "the folder holds an adapter that was not written here; name another one")),
    }
}
