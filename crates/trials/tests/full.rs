//! Every trial in its full form; run by name, as `cargo test --release -p espalier-trials --test full -- --ignored NAME`.

mod common;

macro_rules! tests {
    ($($name:ident;)*) => {
        $(#[test]
        #[ignore = "takes minutes; its record is in bench/reliability"]
        fn $name() {
            common::holds(&espalier_trials::$name::TRIAL, espalier_trials::Form::Full);
        })*
    };
}

espalier_trials::with_trials!(tests);
