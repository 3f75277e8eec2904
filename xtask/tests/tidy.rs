//! The invariants and the generated documentation, as tests.
#![allow(clippy::unwrap_used)]

#[test]
fn the_tree_is_tidy() {
    let faults = xtask::tidy::check(&xtask::root());
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn generated_documentation_is_that_of_the_code() {
    for (path, text) in xtask::docs::pages(&xtask::root()) {
        let committed = std::fs::read_to_string(xtask::root().join(&path)).unwrap_or_default();
        assert!(committed == text, "{} is not what `cargo xtask docs` writes", path.display());
    }
}
