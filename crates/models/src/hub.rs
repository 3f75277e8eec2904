//! Models by hub id: downloads the files of a repository into the user's cache and gives the local folder.

use std::path::PathBuf;

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Repo, RepoType};

use crate::{Error, Result};

/// Files of a repository that are fetched, by ending.
const WANTED: &[&str] = &[".json", ".safetensors", ".txt", ".model", ".jinja", ".gguf"];

/// Whether `name` looks like a hub id (`owner/name`) and not like a path.
pub fn is_hub_id(name: &str) -> bool {
    let mut parts = name.split('/');
    let valid = |p: Option<&str>| {
        p.is_some_and(|p| {
            !p.is_empty() && !p.starts_with('.') && p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        })
    };
    valid(parts.next()) && valid(parts.next()) && parts.next().is_none()
}

/// The local folder of the hub model `id` at `revision` (the main branch if None), downloaded where it is not yet there.
///
/// # Errors
/// If the hub cannot be reached or has no such repository.
pub fn fetch(id: &str, revision: Option<&str>) -> Result<PathBuf> {
    let failed = |what: &str, e: &dyn std::fmt::Display| Error::NotAModel {
        path: PathBuf::from(id),
        message: format!("neither a local folder nor to be had from the hub: {what}: {e}"),
    };
    let api = ApiBuilder::from_env().build().map_err(|e| failed("setting up the download", &e))?;
    let revision = revision.unwrap_or("main").to_owned();
    let repo = api.repo(Repo::with_revision(id.to_owned(), RepoType::Model, revision));
    let info = repo.info().map_err(|e| failed("listing the repository", &e))?;
    let mut folder = None;
    for file in info.siblings {
        let name = file.rfilename;
        if name.contains('/') || !WANTED.iter().any(|end| name.ends_with(end)) {
            continue;
        }
        let path = repo.get(&name).map_err(|e| failed(&name, &e))?;
        folder = path.parent().map(PathBuf::from);
    }
    folder.ok_or_else(|| Error::NotAModel {
        path: PathBuf::from(id),
        message: "the repository holds no model files".into(),
    })
}
