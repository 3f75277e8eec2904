//! The exact checks of every system that has some.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use espalier_systems::{SYSTEMS, Status, System};

#[test]
fn every_exact_check_holds() {
    for system in SYSTEMS.iter().filter(|system| system.checks.is_some()) {
        let found = system.reproduce(true).unwrap_or_else(|e| panic!("{}: {e:#}", system.name));
        for check in found.checks.iter().filter(|check| !check.passed) {
            eprintln!(
                "{}: {} ({}): {} is not {}",
                system.name, check.name, check.claim, check.measured, check.threshold
            );
        }
        assert!(found.passed, "{}", system.name);
        assert!(found.seconds < 60.0, "{} took {} s", system.name, found.seconds);
    }
}

#[test]
fn the_list_is_whole_and_says_where_the_code_is() {
    assert_eq!(SYSTEMS.len(), 41);
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for system in SYSTEMS {
        assert_eq!(System::by_name(system.name).unwrap().title, system.title);
        assert_eq!(system.status == Status::NotYet, system.code.is_empty(), "{}", system.name);
        assert!(system.status != Status::Works || system.checks.is_some(), "{}", system.name);
        assert_eq!(system.status == Status::Works, system.missing.is_empty(), "{}", system.name);
        for file in system.code {
            assert!(root.join(file).is_file(), "{}: {file}", system.name);
        }
    }
    assert!(System::by_name("bonne").unwrap_err().to_string().contains("bone"));
    assert!(SYSTEMS.iter().find(|s| s.checks.is_none()).unwrap().reproduce(true).is_err());
}
