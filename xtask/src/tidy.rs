//! Invariants of absence: what each room of the house must not know or do.

use std::path::{Path, PathBuf};

use crate::docs;

/// Most lines of a library file.
const LONGEST: usize = 400;

/// Every Rust file under `folder`, by its path relative to `root`.
fn rust_files(root: &Path, folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && path.file_name().is_some_and(|n| n != "target") {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(root).map(|p| p.display().to_string()).unwrap_or_default();
                found.push((name, std::fs::read_to_string(&path).unwrap_or_default()));
            }
        }
    }
    found.sort();
    found
}

/// The code of a file, its comments and its test module left out.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .take_while(|(_, line)| !line.starts_with("#[cfg(test)]"))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .map(|(i, line)| (i + 1, line))
}

/// Faults of the tree under `root`, one line each.
pub fn check(root: &Path) -> Vec<String> {
    let mut faults = Vec::new();
    let crates = ["kernels", "adapters", "models", "data", "infer", "train", "trials", "systems", "cli"];
    for name in crates {
        for (path, text) in rust_files(root, &format!("crates/{name}/src")) {
            if text.lines().count() > LONGEST && !path.contains("synthetic/words") {
                faults.push(format!("{path}: {} lines, more than {LONGEST}", text.lines().count()));
            }
            if !text.starts_with("//!") {
                faults.push(format!("{path}: no head comment"));
            }
            for (line, found) in forbidden(name, &path, &text) {
                faults.push(format!("{path}:{line}: {found}"));
            }
        }
        faults.extend(dependencies(root, name));
    }
    for folder in docs::shelves() {
        for path in docs::shelf(root, folder) {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let head = docs::head(&text);
            for label in docs::CARD {
                if !head.iter().any(|l| l.starts_with(label)) {
                    faults.push(format!("{}: the head comment lacks `{label}`", path.display()));
                }
            }
        }
    }
    faults.extend(paths_in_docs(root));
    faults
}

/// Lines of a file that say what its crate must not.
fn forbidden(name: &str, path: &str, text: &str) -> Vec<(usize, String)> {
    let methods = ["lora", "dora", "pissa", "olora"];
    let mut found = Vec::new();
    for (line, code) in code(text) {
        let mut say = |what: &str| found.push((line, what.to_owned()));
        let lower = code.to_ascii_lowercase();
        if name != "cli" && ["println!", "eprintln!", "print!(", "eprint!("].iter().any(|m| code.contains(m)) {
            say("prints; only the command line does");
        }
        if name != "cli" && code.contains("clap::") {
            say("knows clap; only the command line does");
        }
        if ["no_bwd", "candle_nn"].iter().any(|m| code.contains(m)) && name != "kernels" {
            say("an operation that cuts the gradient");
        }
        if name == "models" && methods.iter().any(|m| lower.contains(m)) {
            say("a model names a method");
        }
        if name == "kernels" && ["adapter", "lora"].iter().any(|m| lower.contains(m)) {
            say("a kernel knows of adapters");
        }
        let outside = name != "adapters" || !path.contains("/formats/");
        if outside && name != "cli" && (code.contains("base_model.model") || code.contains("adapter_model.safetensors"))
        {
            say("a key or file name of adapter folders outside formats/");
        }
        if name == "adapters"
            && path.contains("/parametrisation/")
            && ["llama", "gpt2", "bert"].iter().any(|m| lower.contains(m))
        {
            say("a method names a model");
        }
    }
    found
}

/// Crates may depend only on those below them.
fn dependencies(root: &Path, name: &str) -> Vec<String> {
    let below: &[&str] = match name {
        "kernels" | "data" => &[],
        "adapters" => &["kernels"],
        "models" => &["kernels", "adapters"],
        "infer" => &["kernels", "adapters", "models", "data"],
        "train" => &["kernels", "adapters", "models", "data", "infer"],
        "cli" => &["kernels", "adapters", "models", "data", "infer", "train", "systems"],
        _ => &["kernels", "adapters", "models", "data", "infer", "train"],
    };
    let manifest = std::fs::read_to_string(root.join(format!("crates/{name}/Cargo.toml"))).unwrap_or_default();
    let normal = manifest.split("[dev-dependencies]").next().unwrap_or_default();
    normal
        .lines()
        .filter_map(|l| l.strip_prefix("espalier-")?.split(['.', ' ', '=']).next())
        .filter(|dependency| !below.contains(dependency))
        .map(|dependency| format!("crates/{name}/Cargo.toml: reaches up to {dependency}"))
        .collect()
}

/// Paths in backticks or links of the documents that do not exist.
fn paths_in_docs(root: &Path) -> Vec<String> {
    let mut faults = Vec::new();
    let mut pages: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].iter().map(|p| root.join(p)).collect();
    pages.extend(std::fs::read_dir(root.join("docs")).into_iter().flatten().flatten().map(|e| e.path()));
    for page in pages {
        let Ok(text) = std::fs::read_to_string(&page) else { continue };
        for word in text.split(['`', '(', ')', ' ', '\n', ',']) {
            let word = word.trim_end_matches(['.', ':', ';']);
            let in_tree = ["crates/", "docs/", "parity/", "recipes/", "xtask/"].iter().any(|p| word.starts_with(p));
            if in_tree && !word.contains(['*', '<', '{', '$', '#']) && !root.join(word).exists() {
                faults.push(format!("{}: `{word}` does not exist", page.display()));
            }
        }
    }
    faults
}
