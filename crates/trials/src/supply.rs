//! R-43: what the program is made of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use semver::{Version, VersionReq};
use serde_json::{Value, json};

use crate::{Scope, Tally, Trial, root};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-43",
    title: "Supply chain",
    claim: "Every package that goes into the program has a licence that allows giving it away, and comes from the registry with a \
            checksum; no locked version is one that an advisory of the RustSec database names (where `ESPALIER_ADVISORIES` \
            is a copy of it; the newest advisory's date is given); every unsafe block here says why it is sound; nothing here \
            calls a reader of pickles. `cargo xtask supply` prints the bill of materials.",
    unit: "packages or places at fault",
    bar: 0.0,
    bounded: 300,
    full: 300,
    run,
};

/// Licences that allow giving the program away, whatever its users do with it.
const LICENCES: [&str; 15] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Ways to call candle's reader of pickles.
const PICKLES: [&str; 4] = ["candle_core::pickle", "pickle::", "PthTensors", "from_pth"];

/// The folder of a copy of the RustSec database.
const DATABASE: &str = "ESPALIER_ADVISORIES";

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let packages = packages()?;
    licences(&packages, tally);
    code(tally)?;
    match std::env::var_os(DATABASE) {
        Some(folder) => advisories(&packages, Path::new(&folder), tally),
        None if scope.is_full() => anyhow::bail!("{DATABASE} names no copy of the RustSec database, so advisories were not compared"),
        None => {
            tally.count("advisories not compared: no database");
            Ok(())
        }
    }
}

/// A locked package.
#[derive(Debug, Clone)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: Version,
    /// Its licence, as SPDX has it.
    pub licence: Option<String>,
    /// SHA-256 of its archive in the registry; None for packages of this repository.
    pub checksum: Option<String>,
    /// Whether it is of this repository.
    pub own: bool,
}

/// Every package of the lock file, from cargo.
///
/// # Errors
/// If cargo cannot be run, or the lock file cannot be read.
pub fn packages() -> Result<Vec<Package>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .current_dir(root())
        .output()
        .context("cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let lock: toml::Table = std::fs::read_to_string(root().join("Cargo.lock"))?.parse()?;
    let mut checksums = BTreeMap::new();
    for entry in lock.get("package").and_then(toml::Value::as_array).into_iter().flatten() {
        let text = |key: &str| entry.get(key).and_then(toml::Value::as_str).map(str::to_owned);
        if let (Some(name), Some(version)) = (text("name"), text("version")) {
            checksums.insert((name, version), text("checksum"));
        }
    }
    let list = metadata["packages"].as_array().context("cargo metadata: no packages")?;
    list.iter()
        .map(|package| {
            let text = |key: &str| package[key].as_str().map(str::to_owned);
            let name = text("name").context("a package without a name")?;
            let version = text("version").with_context(|| name.clone())?;
            let checksum = checksums.get(&(name.clone(), version.clone())).cloned().flatten();
            Ok(Package {
                version: Version::parse(&version)?,
                licence: text("license"),
                checksum,
                own: package["source"].is_null(),
                name,
            })
        })
        .collect()
}

/// Whether one of the choices that a licence expression leaves is allowed.
fn allowed(expression: &str) -> bool {
    let choice = |text: &str| LICENCES.contains(&text.trim().trim_matches(['(', ')']).trim());
    // Older packages write a slash for OR.
    let expression = expression.replace('/', " OR ");
    let every = |part: &str| part.split(" AND ").all(|term| term.split(" OR ").any(choice));
    every(&expression) || !expression.contains('(') && expression.split(" OR ").any(|part| part.split(" AND ").all(choice))
}

fn licences(packages: &[Package], tally: &mut Tally) {
    for package in packages {
        let licence = package.licence.as_deref().unwrap_or("none");
        let sound = allowed(licence) && (package.own || package.checksum.is_some());
        tally.held(format!("{} {}: licence {licence}, checksum {:?}", package.name, package.version, package.checksum), sound);
        tally.count(if package.own { "packages here" } else { "packages of the registry" });
    }
}

/// Rust files of this repository.
fn sources() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("crates"), root().join("xtask")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Unsafe blocks with their reasons, by crate, and readers of pickles.
fn code(tally: &mut Tally) -> Result<()> {
    for path in sources()? {
        let text = std::fs::read_to_string(&path)?;
        let shown = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
        let room = shown.split('/').nth(1).unwrap_or_default().to_owned();
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if opens_unsafe(code) {
                tally.count(format!("unsafe in {room}"));
                tally.held(format!("{shown}:{}: unsafe without a SAFETY comment", at + 1), reasoned(&lines, at));
            }
            // This file names the readers to look for.
            if !shown.ends_with("trials/src/supply.rs") && PICKLES.iter().any(|call| code.contains(call)) {
                tally.held(format!("{shown}:{}: calls a reader of pickles", at + 1), false);
            }
        }
    }
    Ok(())
}

/// Whether a line opens an unsafe block or implementation. Unsafe functions have a `# Safety` section, which the compiler asks
/// of their callers.
fn opens_unsafe(code: &str) -> bool {
    let quoted = code.split('"').step_by(2).collect::<String>();
    ["unsafe {", "unsafe impl"].iter().any(|word| quoted.contains(word))
}

/// Whether the comment above a line, above the statement it is in, or in the block, says SAFETY.
fn reasoned(lines: &[&str], at: usize) -> bool {
    let around = at.saturating_sub(8)..(at + 2).min(lines.len());
    lines[around].iter().any(|line| line.contains("SAFETY:"))
}

/// Compares the locked versions with the advisories of a copy of the database.
fn advisories(packages: &[Package], database: &Path, tally: &mut Tally) -> Result<()> {
    let folder = database.join("crates");
    let mut newest = String::new();
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        for file in std::fs::read_dir(entry?.path())? {
            let path = file?.path();
            let text = std::fs::read_to_string(&path)?;
            // An advisory begins with its data in a block of TOML.
            let block = text.split("```toml").nth(1).and_then(|rest| rest.split("```").next());
            let data: toml::Table = block.with_context(|| path.display().to_string())?.parse()?;
            let about = data.get("advisory").and_then(toml::Value::as_table).context("no advisory")?;
            let field = |key: &str| about.get(key).and_then(toml::Value::as_str).unwrap_or_default().to_owned();
            seen += 1;
            newest = newest.max(field("date"));
            if about.contains_key("withdrawn") {
                continue;
            }
            for package in packages.iter().filter(|package| package.name == field("package")) {
                tally.count("advisories of packages that are used");
                if field("informational") == "unmaintained" {
                    tally.count(format!("unmaintained: {}", package.name));
                    continue;
                }
                let spared = spared(&data, &package.version).with_context(|| path.display().to_string())?;
                tally.held(format!("{} {}: {}", package.name, package.version, field("id")), spared);
            }
        }
    }
    ensure!(seen > 100, "{}: {seen} advisories are no database", folder.display());
    tally.counts.insert(format!("advisories, the newest of {newest}"), seen);
    Ok(())
}

/// Whether a version is patched, or was never affected.
fn spared(data: &toml::Table, version: &Version) -> Result<bool> {
    let versions = data.get("versions").and_then(toml::Value::as_table).context("no versions")?;
    for key in ["patched", "unaffected"] {
        for range in versions.get(key).and_then(toml::Value::as_array).into_iter().flatten() {
            let range = range.as_str().unwrap_or_default();
            if VersionReq::parse(range).with_context(|| range.to_owned())?.matches(version) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The bill of materials: CycloneDX 1.5.
///
/// # Errors
/// As [`packages`].
pub fn bill() -> Result<Value> {
    let components: Vec<Value> = packages()?
        .into_iter()
        .map(|package| {
            let mut component = json!({
                "type": "library", "name": package.name, "version": package.version.to_string(),
                "purl": format!("pkg:cargo/{}@{}", package.name, package.version),
                "licenses": package.licence.iter().map(|l| json!({"expression": l.replace('/', " OR ")})).collect::<Vec<_>>(),
            });
            if let Some(checksum) = package.checksum {
                component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
            }
            component
        })
        .collect();
    Ok(json!({"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_and_versions_are_judged() {
        for good in ["MIT", "MIT OR Apache-2.0", "MIT/Apache-2.0", "Apache-2.0 AND ISC", "MIT OR LGPL-2.1-or-later", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
            assert!(allowed(good), "{good}");
        }
        for bad in ["GPL-3.0", "none", "MIT AND GPL-3.0", "(MIT OR Apache-2.0) AND GPL-2.0"] {
            assert!(!allowed(bad), "{bad}");
        }
        let data: toml::Table = "[versions]\npatched = [\">= 1.2.3, < 2.0.0\", \">= 2.1\"]\nunaffected = [\"< 1.0\"]\n".parse().unwrap_or_default();
        for (version, expected) in [("0.9.0", true), ("1.2.2", false), ("1.2.3", true), ("2.0.5", false), ("2.2.0", true)] {
            assert_eq!(Version::parse(version).ok().and_then(|v| spared(&data, &v).ok()), Some(expected), "{version}");
        }
    }
}
