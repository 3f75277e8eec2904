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
