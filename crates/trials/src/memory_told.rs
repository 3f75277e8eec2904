//! the memory of a run is told before it begins.

use std::path::Path;

use anyhow::ensure;
use espalier_adapters::MethodConfig;
use espalier_train::Recipe;
use serde_json::Value;
use toml::Table;

use crate::made::{self, Shape};
use crate::worker::{self, Job};
use crate::{Scope, Tally, Trial, runs};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-24",
    title: "Memory told before a run",
    claim: "The peak of a run's resident memory (VmHWM of its process, from the load of the model to the report) is what the \
            plan said before the first step, within 15 % in the worst configuration and 5 % in the middle one: methods, \
            storages, batches, lengths, packing, dropout, recomputed blocks, evaluation, trained tables, classes, decoders \
            and encoders of 10 to 14 million values, and every method in each of its examples. Half of the configurations \
            were held out while this was built; the middle of both halves is in the counts. CPU, glibc's allocator, two \
            threads; on a CUDA device the plan is of formulas, which this does not try.",
    unit: "% of the peak, the worst configuration",
    bar: 15.0,
    bounded: 2,
    full: 24,
    run,
};

/// Largest middle error in %.
const MIDDLE: f64 = 5.0;

/// A run whose memory is told and measured.
struct Case {
    name: String,
    recipe: Recipe,
    /// Whether it was looked at only when all was built.
    held_out: bool,
}

/// Writes models and rows into `folder`; the base recipe of each family.
struct Families {
    llama: Recipe,
    gpt2: Recipe,
    bert: Recipe,
    gemma2: Recipe,
}

fn families(folder: &Path, shape: Shape) -> anyhow::Result<Families> {
    let words = folder.join("words");
    let classes = folder.join("classes.jsonl");
    std::fs::write(&classes, runs::labelled(&words, 48)?)?;
    for length in [64, 128, 256, 512] {
        // The longest first, so that a few steps meet the widest batch there is.
        let text = runs::rows(64, length)?;
        let mut rows: Vec<&str> = text.lines().collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.len()));
        std::fs::write(folder.join(format!("rows-{length}.jsonl")), rows.join("\n") + "\n")?;
    }
    let recipe = |name: &str, config: Value| -> anyhow::Result<Recipe> {
        let model = folder.join(name);
        made::write(&model, config)?;
        Ok(Recipe {
            model: model.display().to_string(),
            device: "cpu".into(),
            dtype: "f32".into(),
            data: runs::data(&folder.join("rows-128.jsonl")),
            batch_size: 4,
            shuffle: false,
            max_steps: Some(3),
            save_every: 3,
            eval_every: 2,
            lr: 1e-4,
            ..Recipe::default()
        })
    };
    Ok(Families {
        llama: recipe("llama", made::llama(shape))?,
        gpt2: recipe("gpt2", made::gpt2(shape))?,
        bert: Recipe {
            tokenizer: Some(words.display().to_string()),
            data: runs::data(&classes),
            batch_size: 16,
            ..recipe("bert", made::bert(shape))?
        },
        gemma2: recipe("gemma2", made::gemma2(shape))?,
    })
}

fn table(text: &str) -> anyhow::Result<Table> {
    Ok(text.parse()?)
}

fn cases(folder: &Path, shape: Shape) -> anyhow::Result<Vec<Case>> {
    let Families { llama, gpt2, bert, gemma2 } = families(folder, shape)?;
    let long = |length: usize| runs::data(&folder.join(format!("rows-{length}.jsonl")));
    let lora = |r: usize| table(&format!("method = 'lora'\nr = {r}"));
    let with = |recipe: &Recipe, settings: &str| -> anyhow::Result<Recipe> {
        Ok(Recipe { adapter: table(settings)?, ..recipe.clone() })
    };
    let mut cases = Vec::new();
    let mut add = |name: &str, held_out: bool, recipe: Recipe| {
        cases.push(Case { name: name.to_owned(), recipe, held_out });
    };
    add("next tokens, 4 rows of 128", false, llama.clone());
    add("1 row of 512", true, Recipe { batch_size: 1, data: long(512), ..llama.clone() });
    add("16 rows of 64", false, Recipe { batch_size: 16, data: long(64), ..llama.clone() });
    add("16 rows of 256", true, Recipe { batch_size: 16, data: long(256), ..llama.clone() });
    add("bf16, 8 rows of 256", false, Recipe { batch_size: 8, dtype: "bf16".into(), data: long(256), ..llama.clone() });
    add("bf16, 1 row of 128", true, Recipe { batch_size: 1, dtype: "bf16".into(), ..llama.clone() });
    add("nf4", false, Recipe { quantization: "nf4".into(), data: long(256), ..llama.clone() });
    add("int8", true, Recipe { quantization: "int8".into(), data: long(256), ..llama.clone() });
    add("rank 64, rank-stabilised", false, with(&llama, "method = 'lora'\nr = 64\nrslora = true")?);
    add("packed rows of 256", true, Recipe {
        packing: true,
        max_length: 256,
        data: long(128),
        ..llama.clone()
    });
    add("dropout", false, with(&llama, "method = 'lora'\ndropout = 0.1")?);
    add("blocks recomputed", true, Recipe { checkpointing: true, batch_size: 16, data: long(256), ..llama.clone() });
    add("blocks recomputed, dropout", false, Recipe {
        checkpointing: true,
        batch_size: 8,
        data: long(256),
        ..with(&llama, "method = 'lora'\ndropout = 0.1")?
    });
    add("evaluation of larger batches", true, Recipe {
        validation_split: 24.0,
        eval_batch_size: 24,
        batch_size: 1,
        data: long(256),
        ..llama.clone()
    });
    add("evaluation, accumulated", false, Recipe {
        validation_split: 8.0,
        accumulation: 3,
        data: long(256),
        ..llama.clone()
    });
    add("tables adapted", true, with(&llama, "method = 'lora'\ntarget_modules = ['embed_tokens', 'q_proj', 'v_proj']")?);
    add("table and head trained whole", false, with(
        &llama,
        "method = 'lora'\nmodules_to_save = ['embed_tokens', 'lm_head']",
    )?);
    add("upper blocks alone", true, Recipe {
        batch_size: 16,
        ..with(&llama, "method = 'lora'\nlayers_to_transform = [2]")?
    });
    add("tied, one projection for three", false, Recipe { adapter: lora(16)?, batch_size: 8, ..gpt2.clone() });
    add("tied, rows of 512", true, Recipe { batch_size: 2, data: long(512), ..gpt2 });
    add("classes", false, bert.clone());
    add("classes, batches of 48", true, Recipe { batch_size: 48, adapter: lora(16)?, ..bert });
    add("norms on both sides, soft caps", true, Recipe { data: long(256), ..gemma2.clone() });
    add("norms on both sides, bf16", false, Recipe { dtype: "bf16".into(), data: long(256), ..gemma2 });
    for (i, (name, method)) in MethodConfig::examples().into_iter().enumerate() {
        let recipe = Recipe { adapter: runs::table(&method)?, data: long(128), ..llama.clone() };
        cases.push(Case { name, recipe, held_out: i % 2 == 1 });
    }
    Ok(cases)
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    let shape = match scope.is_full() {
        true => Shape { hidden: 384, ff: 1024, layers: 6, vocab: 4096 },
        false => Shape { hidden: 256, ff: 768, layers: 3, vocab: 1024 },
    };
    let mut cases = cases(scope.scratch, shape)?;
    if !scope.is_full() {
        cases.truncate(scope.least as usize);
    }
    let (mut seen, mut held_out) = (Vec::new(), Vec::new());
    for (i, case) in cases.into_iter().enumerate() {
        let out = scope.scratch.join(format!("run-{i}"));
        let job = scope.scratch.join("job.json");
        let recipe = Recipe { out: out.display().to_string(), ..case.recipe };
        scope.worker.finish(&Job { recipe: recipe.to_toml()?, resume: false, stand_still: None }, &job, Some(2))?;
        let found = worker::memory_of(&job)?;
        ensure!(found.told.rehearsed && found.peak > 0, "{}: nothing was rehearsed or measured", case.name);
        let error = 100.0 * (found.told.total as f64 / found.peak as f64 - 1.0);
        let mib = |bytes: u64| bytes >> 20;
        let (told, peak) = (mib(found.told.total), mib(found.peak));
        tally.value(format!("{}: {told} MiB told, {peak} MiB measured", case.name), error.abs());
        tally.count(format!("{}: {error:+.1} % of {peak} MiB", case.name));
        if case.held_out { &mut held_out } else { &mut seen }.push(error.abs());
        std::fs::remove_dir_all(&out)?;
    }
    let all: Vec<f64> = seen.iter().chain(&held_out).copied().collect();
    for (what, errors) in [("all", &all), ("seen while built", &seen), ("held out", &held_out)] {
        if let Some(middle) = middle(errors) {
            tally.count(format!("middle of {} {what}: {middle:.1} %", errors.len()));
        }
    }
    let middle = middle(&all).unwrap_or(f64::INFINITY);
    ensure!(!scope.is_full() || middle <= MIDDLE, "the middle error is {middle:.1} %, at most {MIDDLE} % is wanted");
    Ok(())
}

fn middle(errors: &[f64]) -> Option<f64> {
    let mut errors = errors.to_vec();
    errors.sort_by(f64::total_cmp);
    errors.get(errors.len() / 2).copied()
}
