//! The generated text: determinism, the split, variety, form, refusals, the corpus file.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, HashSet};

use espalier_data::synthetic::{
    Generator, QUICKSTART_SKILL, Sample, Skill, Source, Split, SyntheticError, mixture, to_row, write_corpus,
};

const SEEDS: [u64; 2] = [1, 99];

fn draws(skill: Skill, seed: u64, split: Split, count: u64) -> Vec<Sample> {
    let generator = Generator::of(skill, seed, split);
    (0..count).map(|index| generator.sample(index)).collect()
}

fn whole(sample: &Sample) -> String {
    match &sample.messages {
        Some(turns) => turns.iter().map(|(_, content)| content.as_str()).collect::<Vec<_>>().join("\n"),
        None => sample.text.clone().unwrap_or_default(),
    }
}

#[test]
fn samples_depend_on_seed_skill_split_and_index_alone() {
    let train = Generator::new(mixture(), 5, Split::Train).unwrap();
    let again = Generator::new(mixture(), 5, Split::Train).unwrap();
    let forward: Vec<Sample> = (0..300).map(|index| train.sample(index)).collect();
    let backward: Vec<Sample> = (0..300).rev().map(|index| again.sample(index)).collect();
    assert!(forward.iter().eq(backward.iter().rev()));
    let other = Generator::new(mixture(), 6, Split::Train).unwrap();
    assert!((0..300).filter(|index| other.sample(*index) == forward[*index as usize]).count() < 5);
    // Far indices are as cheap as near ones.
    let far = train.sample(u64::MAX);
    assert_eq!(far, again.sample(u64::MAX));
}

#[test]
fn train_and_test_share_no_input_even_across_seeds() {
    for skill in Skill::ALL {
        let mut train_keys = HashSet::new();
        let mut train_prompts = HashSet::new();
        for seed in SEEDS {
            for sample in draws(skill, seed, Split::Train, 1500) {
                train_prompts.insert(sample.prompt.clone().unwrap_or_else(|| whole(&sample)));
                train_keys.insert(sample.key);
            }
        }
        for seed in SEEDS {
            for sample in draws(skill, seed, Split::Test, 700) {
                assert!(!train_keys.contains(&sample.key), "{skill}: {}", sample.key);
                // In a conversation the last turn alone ("Thanks") may recur; the conversation may not.
                if skill != Skill::Chat {
                    let prompt = sample.prompt.clone().unwrap_or_else(|| whole(&sample));
                    assert!(!train_prompts.contains(&prompt), "{skill}: {prompt}");
                }
            }
        }
    }
}

#[test]
fn text_is_varied_short_and_plain_ascii() {
    for skill in Skill::ALL {
        let samples = draws(skill, 3, Split::Train, 1200);
        let rows: HashSet<String> = samples.iter().map(|sample| to_row(sample).to_string()).collect();
        assert!(rows.len() >= 1000, "{skill}: only {} different rows", rows.len());
        let mut sizes: Vec<usize> = samples.iter().map(|sample| whole(sample).len()).collect();
        sizes.sort_unstable();
        assert!(sizes[sizes.len() * 95 / 100] < 900, "{skill}: {sizes:?}");
        assert!(sizes[0] >= 1, "{skill}");
        for sample in &samples {
            let text = whole(sample);
            assert!(text.bytes().all(|byte| byte == b'\n' || (0x20..0x7f).contains(&byte)), "{skill}: {text:?}");
            assert_eq!(text.trim(), text, "{skill}: {text:?}");
        }
    }
}

#[test]
fn prose_has_no_leftovers_of_its_grammar() {
    for skill in [Skill::Story, Skill::Sentence, Skill::Passage] {
        for sample in draws(skill, 11, Split::Train, 4000) {
            let text = sample.text.unwrap();
            assert!(!text.contains(['{', '}', '[', ']', '|', '~', '@']), "{text}");
            for slip in ["  ", " .", " ,", "..", " a a", " a e", " a o", " an b", " the the ", " ?", ",,", " 's"] {
                assert!(!text.contains(slip), "`{slip}` in: {text}");
            }
            assert_eq!(text.matches('"').count() % 2, 0, "{text}");
            assert!(text.starts_with(|c: char| c.is_ascii_uppercase() || c == '"'), "{text}");
        }
    }
}

#[test]
fn stories_have_three_to_a_dozen_sentences() {
    for sample in draws(Skill::Story, 2, Split::Train, 1000) {
        let text = sample.text.unwrap();
        let ends = text.matches(['.', '!', '?']).count();
        assert!((3..=26).contains(&ends), "{ends}: {text}");
    }
}

#[test]
fn plain_answers_end_their_text_and_chats_alternate() {
    for skill in Skill::ALL {
        for sample in draws(skill, 8, Split::Train, 400) {
            assert!(sample.text.is_some() != sample.messages.is_some(), "{skill}: text or messages, not both");
            if let (Some(text), Some(prompt), Some(answer)) = (&sample.text, &sample.prompt, &sample.answer) {
                assert_eq!(text, &format!("{prompt} {answer}"));
            }
            if let Some(turns) = &sample.messages {
                let roles: Vec<&str> = turns.iter().map(|(role, _)| role.as_str()).collect();
                let talk = roles.strip_prefix(&["system"]).unwrap_or(&roles);
                assert!(talk.len() >= 2 && talk.len().is_multiple_of(2), "{roles:?}");
                assert!(talk.chunks(2).all(|pair| pair == ["user", "assistant"]), "{roles:?}");
                assert!(turns.iter().all(|(_, content)| !content.is_empty()));
                assert_eq!(sample.prompt.as_ref(), turns.get(turns.len() - 2).map(|turn| &turn.1));
                if let Some(answer) = &sample.answer {
                    assert_eq!(Some(answer), turns.last().map(|turn| &turn.1));
                }
            }
            if skill.held_out() {
                assert!(sample.messages.is_some() && sample.answer.is_some(), "{skill} must be checkable chat");
            }
        }
    }
}

#[test]
fn the_mixture_leaves_held_out_skills_out_and_keeps_its_shares() {
    let weights = mixture();
    assert!(weights.iter().all(|(skill, weight)| !skill.held_out() && *weight > 0.0));
    assert!(
        Skill::ALL
            .iter()
            .filter(|skill| !skill.held_out())
            .all(|skill| weights.iter().any(|(known, _)| known == skill))
    );
    assert!((weights.iter().map(|(_, weight)| weight).sum::<f64>() - 1.0).abs() < 1e-9);
    assert!(QUICKSTART_SKILL.held_out());
    let generator = Generator::new(weights.clone(), 2, Split::Train).unwrap();
    let mut seen: BTreeMap<Skill, f64> = BTreeMap::new();
    let mut language = 0.0;
    let mut chars = 0.0;
    for index in 0..8000 {
        let sample = generator.sample(index);
        *seen.entry(sample.skill).or_default() += 1.0 / 8000.0;
        let size = whole(&sample).len() as f64;
        chars += size;
        if matches!(sample.skill, Skill::Story | Skill::Sentence | Skill::Passage) {
            language += size;
        }
        // No text of the mixture holds an invented word of the held-out skills.
        for code in ["zor", "mip", "glim", "drob", "quill", "Tally:", "Swap:", "Rule:", "Label:"] {
            let text = whole(&sample);
            let whole_word = text.split(' ').any(|word| word.trim_matches(['.', ',']) == code);
            assert!(!whole_word || sample.skill == Skill::Copy, "{code} in {text}");
        }
    }
    for (skill, weight) in weights {
        assert!((seen[&skill] - weight).abs() < 0.02, "{skill}: {}", seen[&skill]);
    }
    assert!((0.55..0.70).contains(&(language / chars)), "{}", language / chars);
}

#[test]
fn bad_mixtures_and_names_are_refused_with_the_reason() {
    assert_eq!(Generator::new(Vec::new(), 0, Split::Train).unwrap_err(), SyntheticError::EmptyMixture);
    assert_eq!(Generator::new(vec![(Skill::Copy, 0.0)], 0, Split::Train).unwrap_err(), SyntheticError::EmptyMixture);
    for weight in [-1.0, f64::NAN, f64::INFINITY] {
        let error = Generator::new(vec![(Skill::Story, 1.0), (Skill::Sort, weight)], 0, Split::Train).unwrap_err();
        assert!(error.to_string().contains("sort"), "{error}");
    }
    let huge = Generator::new(vec![(Skill::Story, f64::MAX), (Skill::Sort, f64::MAX)], 0, Split::Train).unwrap();
    assert_eq!((0..200).map(|index| huge.sample(index).skill).collect::<HashSet<_>>().len(), 2);
    for skill in Skill::ALL {
        assert_eq!(skill.name().parse::<Skill>().unwrap(), skill);
        assert_eq!(serde_json::to_value(skill).unwrap(), serde_json::json!(skill.name()));
    }
    assert_eq!("Rotate-Left".parse::<Skill>().unwrap(), Skill::RotateLeft);
    let error = "juggle".parse::<Skill>().unwrap_err().to_string();
    assert!(error.contains("juggle") && error.contains("story"), "{error}");
}

#[test]
fn a_corpus_is_written_whole_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new").join("corpus.jsonl");
    let counts = write_corpus(&path, 250, 3, Split::Train, mixture()).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let generator = Generator::new(mixture(), 3, Split::Train).unwrap();
    assert_eq!(text.lines().count(), 250);
    for (index, line) in text.lines().enumerate() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(row, to_row(&generator.sample(index as u64)));
    }
    assert_eq!(counts.total.samples, 250);
    assert_eq!(counts.by_skill.values().map(|count| count.chars).sum::<u64>(), counts.total.chars);
    // Nothing but the corpus is left in the folder, and a second corpus replaces the first.
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    write_corpus(&path, 3, 3, Split::Test, Skill::Swap).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
}

#[test]
fn a_corpus_that_cannot_be_written_leaves_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, "x").unwrap();
    assert!(write_corpus(&blocked.join("corpus.jsonl"), 2, 0, Split::Train, Skill::Copy).is_err());
    let error = write_corpus(&blocked, 2, 0, Split::Train, Source::Mixture(Vec::new())).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    assert_eq!(std::fs::read_to_string(&blocked).unwrap(), "x");
}
