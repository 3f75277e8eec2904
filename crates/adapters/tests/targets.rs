//! Placement follows PEFT's rules, and what matches nothing is an error with near misses.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use candle_core::{DType, Device};
use common::Toy;
use espalier_adapters::adapter::Reach;
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::formats::peft_config;
use espalier_adapters::initialisation::{INITIALISATIONS, Initialisation};
use espalier_adapters::parametrisation::METHODS;
use espalier_adapters::parametrisation::trainable_tokens::TrainableTokens;
use espalier_adapters::target::{
    ALL_NORMS, Candidate, INPUT_EMBEDDING, Kind, Layers, Names, Pattern, Placement, TargetSpec,
};
use espalier_adapters::{AdapterConfig, MethodConfig, Result};
use serde_json::json;

fn candidates() -> Vec<Candidate> {
    let mut list = vec![Candidate { path: "model.embed_tokens".into(), kind: Kind::Embedding, head: false }];
    for layer in [0, 1, 2, 10] {
        for name in ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.1.up_proj"] {
            list.push(Candidate { path: format!("model.layers.{layer}.{name}"), kind: Kind::Linear, head: false });
        }
    }
    list.push(Candidate { path: "lm_head".into(), kind: Kind::Linear, head: true });
    list
}

fn endings(names: &[&str]) -> Pattern {
    Pattern::Endings(names.iter().map(|n| (*n).to_owned()).collect())
}

fn expression(text: &str) -> Pattern {
    Pattern::Expression(text.into())
}

fn on(target_modules: Pattern) -> TargetSpec {
    TargetSpec { target_modules, ..TargetSpec::default() }
}

fn place(spec: &TargetSpec) -> Result<Placement> {
    spec.place(&candidates(), 8, 16.0)
}

fn paths(spec: &TargetSpec) -> Vec<String> {
    place(spec).unwrap().sites.into_iter().map(|s| s.path.trim_start_matches("model.layers.").to_owned()).collect()
}

fn error(spec: &TargetSpec) -> String {
    place(spec).unwrap_err().to_string()
}

#[test]
fn a_list_names_whole_endings() {
    assert_eq!(
        paths(&on(endings(&["q_proj"]))),
        ["0.self_attn.q_proj", "1.self_attn.q_proj", "2.self_attn.q_proj", "10.self_attn.q_proj"]
    );
    assert_eq!(paths(&on(endings(&["model.layers.1.mlp.up_proj"]))), ["1.mlp.up_proj"]);
    // An ending begins at a dot: `proj` ends `q_proj` as text, but names no module; a list takes no expression.
    for text in ["proj", ".q_proj", "q_pro", "layers.1", ".*q_proj", "0.self_attn.q_proj$"] {
        assert!(error(&on(endings(&[text]))).contains(text), "{text}");
    }
    assert_eq!(paths(&on(endings(&["lm_head", "embed_tokens"]))), ["model.embed_tokens", "lm_head"]);
    // `1.mlp.up_proj` begins at a dot in one path only; `1.up_proj` in all experts.
    assert_eq!(paths(&on(endings(&["1.mlp.up_proj"]))), ["1.mlp.up_proj"]);
    assert_eq!(paths(&on(endings(&["1.up_proj"]))).len(), 4);
}

#[test]
fn counts_say_how_often_each_pattern_matched() {
    let placement = place(&on(endings(&["q_proj", "up_proj", "self_attn.q_proj"]))).unwrap();
    let counts: Vec<_> = placement.counts.iter().map(|(name, n)| (name.as_str(), *n)).collect();
    assert_eq!(counts, [("q_proj", 4), ("up_proj", 8), ("self_attn.q_proj", 4)]);
    assert_eq!(placement.sites.len(), 12, "a module that two endings name is one site");
}

#[test]
fn an_expression_must_match_the_whole_path() {
    assert_eq!(paths(&on(expression(r".*\.(0|10)\.self_attn\.[qv]_proj"))).len(), 4);
    assert_eq!(paths(&on(expression(r"model\.layers\.1\..*_proj"))).len(), 4);
    for text in ["q_proj", "self_attn.q_proj", r"model\.layers\.1", r".*\.q_pro", "a|q_proj"] {
        assert!(error(&on(expression(text))).contains("matches no module"), "{text}");
    }
    // An alternative is matched whole on both sides.
    assert_eq!(paths(&on(expression("lm_head|.*embed_tokens"))), ["model.embed_tokens", "lm_head"]);
    let broken = error(&on(expression("(q_proj")));
    assert!(broken.contains("target_modules") && broken.contains("(q_proj"), "{broken}");
}

#[test]
fn all_linear_leaves_the_head_and_tables_alone() {
    let all = paths(&TargetSpec::default());
    assert_eq!(all.len(), 16);
    assert!(all.iter().all(|p| !p.contains("lm_head") && !p.contains("embed")));
}

#[test]
fn excluding_wins() {
    let spec = TargetSpec { exclude_modules: Some(endings(&["v_proj", "1.up_proj"])), ..TargetSpec::default() };
    assert_eq!(paths(&spec).len(), 8);
    let spec = TargetSpec {
        exclude_modules: Some(expression(r".*\.(1|2)\..*q_proj")),
        ..on(endings(&["model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"]))
    };
    assert_eq!(paths(&spec), ["0.self_attn.q_proj"]);
    // An expression that matches only a part excludes nothing.
    let spec = TargetSpec { exclude_modules: Some(expression("q_proj")), ..on(endings(&["q_proj"])) };
    assert_eq!(paths(&spec).len(), 4);
    let spec = TargetSpec { exclude_modules: Some(endings(&["q_proj"])), ..on(endings(&["q_proj"])) };
    assert!(error(&spec).contains("leave no module"), "{}", error(&spec));
}

#[test]
fn layers_are_counted_by_the_first_number_of_the_path() {
    let layers = |layers: Layers, pattern: Option<Names>| TargetSpec {
        layers_to_transform: Some(layers),
        layers_pattern: pattern,
        ..on(endings(&["up_proj"]))
    };
    assert_eq!(paths(&layers(Layers::One(1), None)), ["1.mlp.up_proj", "1.mlp.experts.1.up_proj"]);
    assert_eq!(paths(&layers(Layers::Many(vec![0, 10]), None)).len(), 4);
    assert_eq!(paths(&layers(Layers::Many(vec![]), None)).len(), 8, "an empty list means all");
    assert_eq!(paths(&layers(Layers::One(2), Some(Names::One("layers".into())))).len(), 2);
    let experts = layers(Layers::One(1), Some(Names::Many(vec!["experts".into()])));
    assert_eq!(paths(&experts).len(), 4, "the pattern says which list is counted");
    let both = layers(Layers::One(1), Some(Names::Many(vec!["blocks".into(), "layers".into()])));
    assert_eq!(paths(&both).len(), 2);
    assert!(error(&layers(Layers::One(3), None)).contains("leave no module"));
    assert!(error(&layers(Layers::One(0), Some(Names::One("h".into())))).contains("leave no module"));
    assert!(error(&layers(Layers::One(0), Some(Names::One("(h".into())))).contains("layers_pattern"));
    // A list directly below the root has no dot before it.
    let bare = [Candidate { path: "layers.1.up_proj".into(), kind: Kind::Linear, head: false }];
    let spec = layers(Layers::One(1), Some(Names::One("layers".into())));
    assert_eq!(spec.place(&bare, 1, 1.0).unwrap().sites.len(), 1);
    // A module listed by its whole path is meant whatever its layer.
    let spec = TargetSpec {
        layers_to_transform: Some(Layers::One(0)),
        ..on(endings(&["q_proj", "model.layers.2.self_attn.v_proj"]))
    };
    assert_eq!(paths(&spec), ["0.self_attn.q_proj", "2.self_attn.v_proj"]);
}

#[test]
fn patterns_give_single_modules_other_ranks_and_alphas() {
    let spec = TargetSpec {
        rank_pattern: [
            ("q_proj".to_owned(), 2),
            (r"layers\.1\..*".to_owned(), 5),
            ("^model.layers.0.mlp.up_proj".to_owned(), 3),
        ]
        .into(),
        alpha_pattern: [("v_proj".to_owned(), 1.5)].into(),
        ..TargetSpec::default()
    };
    let placement = place(&spec).unwrap();
    let of = |path: &str| placement.sites.iter().find(|s| s.path.ends_with(path)).map(|s| (s.rank, s.alpha)).unwrap();
    assert_eq!(of("0.self_attn.q_proj"), (2, 16.0));
    assert_eq!(of("1.self_attn.v_proj"), (5, 1.5));
    // Where two patterns match, the first in the order of the file (sorted) holds.
    assert_eq!(of("1.self_attn.q_proj"), (5, 16.0));
    assert_eq!(of("0.mlp.up_proj"), (3, 16.0));
    assert_eq!(of("2.mlp.up_proj"), (8, 16.0));
    assert!(placement.counts.contains(&("rank_pattern q_proj = 2".to_owned(), 3)), "{:?}", placement.counts);
    // A key ends the path at a dot; it does not match inside a name.
    for key in ["proj", "q_pro", "layers.1"] {
        let ranks = TargetSpec { rank_pattern: [(key.to_owned(), 2)].into(), ..TargetSpec::default() };
        assert!(error(&ranks).starts_with("rank_pattern"), "{key}: {}", error(&ranks));
        let alphas = TargetSpec { alpha_pattern: [(key.to_owned(), 2.0)].into(), ..TargetSpec::default() };
        assert!(error(&alphas).starts_with("alpha_pattern"), "{key}: {}", error(&alphas));
    }
    let broken = TargetSpec { rank_pattern: [("(".to_owned(), 2)].into(), ..TargetSpec::default() };
    assert!(error(&broken).contains("rank_pattern") && error(&broken).contains("regular expression"));
}

#[test]
fn what_matches_nothing_comes_with_near_misses() {
    let message = error(&on(endings(&["v_proj", "qproj"])));
    assert!(
        message.contains("`qproj`") && message.contains("near misses") && message.contains("`q_proj`"),
        "{message}"
    );
    let message = error(&on(endings(&["self_attn.vproj"])));
    assert!(message.contains("`v_proj`"), "{message}");
    let message = error(&on(endings(&["zzz"])));
    assert!(message.contains("`zzz`") && !message.contains("near misses"), "{message}");
    let spec = AdapterConfig {
        targets: on(endings(&["upproj"])),
        ..AdapterConfig::new(MethodConfig::by_name("lora").unwrap())
    };
    let failed = attach(&mut Toy::new(DType::F32), &spec, Origin::Seed(0), DType::F32, &Device::Cpu).unwrap_err();
    assert!(failed.to_string().contains("`up_proj`") && failed.hint().is_some(), "{failed}");
    for (what, config) in [
        (
            "modules_to_save",
            AdapterConfig {
                modules_to_save: vec!["lm_heda".into()],
                ..AdapterConfig::new(MethodConfig::by_name("full").unwrap())
            },
        ),
        (
            "trainable_tokens",
            AdapterConfig {
                trainable_tokens: Some(espalier_adapters::config::TokenIndices::ByModule(
                    [("embed_token".to_owned(), vec![1])].into(),
                )),
                ..AdapterConfig::new(MethodConfig::by_name("lora").unwrap())
            },
        ),
    ] {
        let failed = attach(&mut Toy::new(DType::F32), &config, Origin::Seed(0), DType::F32, &Device::Cpu).unwrap_err();
        assert!(failed.to_string().starts_with(what), "{failed}");
    }
}

#[test]
fn token_rows_outside_the_table_or_twice_are_refused() {
    for (ids, wanted) in [(vec![11], "token 11"), (vec![1, 2, 1], "distinct"), (vec![], "at least one")] {
        let config = AdapterConfig {
            trainable_tokens: Some(espalier_adapters::config::TokenIndices::Input(ids)),
            ..AdapterConfig::new(MethodConfig::by_name("lora").unwrap())
        };
        let failed = attach(&mut Toy::new(DType::F32), &config, Origin::Seed(0), DType::F32, &Device::Cpu).unwrap_err();
        assert!(failed.to_string().contains(wanted), "{failed}");
    }
}

#[test]
fn methods_that_need_a_product_refuse_a_table() {
    let by_layers = |name: &&&str| MethodConfig::by_name(name).unwrap().reach() == Reach::Maps;
    for name in METHODS.iter().filter(|n| **n != "lora").filter(by_layers) {
        let config = AdapterConfig {
            targets: on(endings(&["embed_tokens"])),
            ..AdapterConfig::new(MethodConfig::by_name(name).unwrap())
        };
        let failed = attach(&mut Toy::new(DType::F32), &config, Origin::Seed(0), DType::F32, &Device::Cpu).unwrap_err();
        assert!(failed.to_string().contains("embed_tokens"), "{name}: {failed}");
    }
}

#[test]
fn unknown_names_come_with_the_nearest_known_one() {
    for (wrong, near) in [("lroa", "lora"), ("Dora", "dora"), ("ful", "full")] {
        let message = MethodConfig::by_name(wrong).unwrap_err().to_string();
        assert!(
            message.contains(&format!("did you mean `{near}`")) && message.contains(&METHODS.join(", ")),
            "{message}"
        );
    }
    for (wrong, near) in [("gausian", "gaussian"), ("pisa", "pissa"), ("default_", "default")] {
        let message = Initialisation::by_name(wrong).unwrap_err().to_string();
        assert!(
            message.contains(&format!("did you mean `{near}`")) && message.contains(&INITIALISATIONS.join(", ")),
            "{message}"
        );
    }
    let message = MethodConfig::by_name("zzzzz").unwrap_err().to_string();
    assert!(!message.contains("did you mean") && message.contains("known"), "{message}");
    let read = |init: &str| {
        peft_config::from_json(json!({"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": init}))
    };
    for changes_the_base in ["loftq", "corda", "lora_ga"] {
        assert!(read(changes_the_base).unwrap_err().to_string().contains(changes_the_base));
    }
    assert!(read("eva").is_ok());
    let message =
        peft_config::from_json(json!({"peft_type": "POLY", "target_modules": ["q_proj"]})).unwrap_err().to_string();
    assert!(message.contains("POLY") && message.contains("lora"), "{message}");
}

#[test]
fn words_for_norms_and_the_token_table_name_those_and_nothing_else() {
    let mut all = candidates();
    all.push(Candidate { path: "model.embed_positions".into(), kind: Kind::Embedding, head: false });
    for path in ["model.layers.0.input_layernorm", "model.norm"] {
        all.push(Candidate { path: path.into(), kind: Kind::Norm, head: false });
    }
    let of = |word: &str| {
        let placed = on(expression(word)).place(&all, 0, 0.0).unwrap();
        placed.sites.into_iter().map(|s| s.path).collect::<Vec<_>>()
    };
    assert_eq!(of(ALL_NORMS), ["model.layers.0.input_layernorm", "model.norm"]);
    assert_eq!(of(INPUT_EMBEDDING), ["model.embed_tokens"]);
    let narrowed = TargetSpec { layers_to_transform: Some(Layers::One(0)), ..on(expression(ALL_NORMS)) };
    assert_eq!(narrowed.place(&all, 0, 0.0).unwrap().sites.len(), 1);
    assert!(on(expression(ALL_NORMS)).place(&candidates(), 0, 0.0).is_err(), "a model without norms");
}

#[test]
fn rows_are_of_the_named_table_and_asked_for_once() {
    let rows = |ids: Vec<u32>| {
        AdapterConfig::new(MethodConfig::TrainableTokens(TrainableTokens { token_indices: ids, init_weights: true }))
    };
    let made = |config: &AdapterConfig| {
        attach(&mut Toy::new(DType::F32), config, Origin::Seed(0), DType::F32, &Device::Cpu).map_err(|e| e.to_string())
    };
    for (ids, wanted) in [(vec![11], "token 11"), (vec![1, 2, 1], "distinct"), (vec![], "at least one")] {
        let failed = made(&rows(ids)).unwrap_err();
        assert!(failed.contains(wanted) && failed.contains("token_indices"), "{failed}");
    }
    let on_a_map = AdapterConfig { targets: on(endings(&["up_proj"])), ..rows(vec![1]) };
    assert!(made(&on_a_map).unwrap_err().contains("up_proj"));
    let twice = espalier_adapters::config::TokenIndices::Input(vec![2]);
    let twice = AdapterConfig { trainable_tokens: Some(twice), ..rows(vec![1]) };
    assert!(made(&twice).unwrap_err().contains("by the method itself"));
    let ranked = TargetSpec { rank_pattern: [("embed_tokens".to_owned(), 2)].into(), ..rows(vec![1]).targets };
    assert!(made(&AdapterConfig { targets: ranked, ..rows(vec![1]) }).unwrap_err().contains("no rank"));
}
