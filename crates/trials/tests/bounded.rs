//! Every trial in its bounded form.

mod common;

macro_rules! tests {
    ($($name:ident;)*) => {
        $(#[test]
        fn $name() {
            common::holds(&espalier_trials::$name::TRIAL, espalier_trials::Form::Bounded);
        })*
    };
}

espalier_trials::with_trials!(tests);

#[test]
fn ids_are_found_and_none_is_twice() {
    let ids: std::collections::BTreeSet<_> = espalier_trials::TRIALS.iter().map(|t| t.id).collect();
    assert_eq!(ids.len(), espalier_trials::TRIALS.len());
    assert!(espalier_trials::Trial::by_id("r-18").is_some() && espalier_trials::Trial::by_id("R-0").is_none());
}

#[test]
fn every_fuzz_target_has_its_file() {
    let folder = espalier_trials::root().join("fuzz");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap_or_default();
    let mut files: Vec<String> = std::fs::read_dir(folder.join("fuzz_targets"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().trim_end_matches(".rs").to_owned())
        .collect();
    files.sort();
    let mut names: Vec<&str> = espalier_trials::fuzz::TARGETS.iter().map(|target| target.name).collect();
    names.sort_unstable();
    assert_eq!(files, names);
    for name in names {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in the manifest");
        let text = std::fs::read_to_string(folder.join(format!("fuzz_targets/{name}.rs"))).unwrap_or_default();
        assert!(text.contains(&format!("\"{name}\"")), "{name}'s file runs another");
    }
}
