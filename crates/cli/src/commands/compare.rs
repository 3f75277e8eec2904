//! `espalier compare`.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use espalier_adapters::formats::atomic;
use espalier_train::compare::{self, Budget, Comparison, Contender, Grid, Progress, Ran};
use espalier_train::recipe::Setting;
use espalier_train::{Observer, Recipe};
use serde::Serialize;

use super::train::{command_line, stop_flag};
use crate::output::Output;
use crate::progress::TrainBar;

/// Compares methods on the same rows and the same budget: a sweep of learning rates for each, and the spread over seeds.
///
/// The sweep runs with the first seed; the best learning rate is run with the others. Finished runs are kept: the same command goes
/// on where it was stopped.
#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// Recipes to compare; with --methods, the one recipe that all of them share.
    #[arg(required = true)]
    recipes: Vec<PathBuf>,
    /// Methods in place of the recipe's own, as they come: lora,dora,randlora. `NAME:key=value:key=value` changes settings.
    #[arg(long, value_delimiter = ',')]
    methods: Vec<String>,
    /// Learning rates of the sweep, the same for all [default: each recipe's own].
    #[arg(long, value_delimiter = ',')]
    lrs: Vec<f64>,
    /// Seeds.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    seeds: Vec<u64>,
    /// Set one recipe key for all, as `max_steps=200`.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// End every run once so many tokens were seen.
    #[arg(long, conflicts_with = "budget_seconds")]
    budget_tokens: Option<u64>,
    /// End every run once so many seconds were spent in steps.
    #[arg(long)]
    budget_seconds: Option<f64>,
    /// Folder of the comparison.
    #[arg(long, default_value = "comparison")]
    out: PathBuf,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Shown(Comparison);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.markdown())
    }
}

struct Bars {
    out: Output,
    bar: TrainBar,
}

impl Progress for Bars {
    fn run(&mut self, place: usize, of: usize, name: &str) {
        self.out.message(format!("[{place}/{of}] {name}"));
        self.bar = TrainBar::new(self.out);
    }

    fn observer(&mut self) -> &mut dyn Observer {
        &mut self.bar
    }

    fn ran(&mut self, ran: &Ran) {
        match (ran.loss, &ran.error) {
            (Some(loss), _) => self.out.message(format!("    held-out loss {loss:.4}")),
            (None, reason) => self.out.message(format!("    failed: {}", reason.as_deref().unwrap_or("unknown"))),
        }
    }
}

fn setting(text: &str) -> Result<Setting> {
    match text.split_once('=') {
        Some((key, value)) => Ok(Setting { key: key.trim().into(), text: value.into() }),
        None => bail!("`{text}`: expected KEY=VALUE"),
    }
}

impl Compare {
    fn contenders(&self) -> Result<Vec<Contender>> {
        let common = self.set.iter().map(|text| setting(text)).collect::<Result<Vec<_>>>()?;
        if self.methods.is_empty() {
            let of = |path: &PathBuf| -> Result<Contender> {
                let name = path.file_stem().map_or_else(|| "recipe".into(), |n| n.to_string_lossy().into_owned());
                Ok(Contender { name, recipe: Recipe::read(Some(path), &common)? })
            };
            return self.recipes.iter().map(of).collect();
        }
        let [path] = self.recipes.as_slice() else { bail!("--methods takes one recipe that all of them share") };
        let of = |text: &String| -> Result<Contender> {
            let mut parts = text.split(':');
            let method = parts.next().unwrap_or_default();
            // The recipe's own settings of the method are those of another one.
            let mut recipe = Recipe::read(Some(path), &common)?;
            recipe
                .adapter
                .retain(|key, _| ["target_modules", "exclude_modules", "bias", "modules_to_save"].contains(&key));
            recipe.adapter.insert("method".into(), method.into());
            for part in parts {
                let Setting { key, text } = setting(part)?;
                let value: toml::Table = toml::from_str(&format!("v = {text}"))
                    .or_else(|_| toml::from_str(&format!("v = {}", toml::Value::from(text.as_str()))))?;
                recipe.adapter.extend(value.into_iter().map(|(_, v)| (key.clone(), v)));
            }
            recipe.adapter_config()?;
            Ok(Contender { name: text.replace([':', '=', '/'], "-"), recipe })
        };
        self.methods.iter().map(of).collect()
    }

    pub(crate) fn run(self, out: Output) -> Result<()> {
        let grid = Grid {
            contenders: self.contenders()?,
            lrs: self.lrs.clone(),
            seeds: self.seeds.clone(),
            budget: match (self.budget_tokens, self.budget_seconds) {
                (Some(tokens), _) => Budget::Tokens(tokens),
                (_, Some(seconds)) => Budget::Seconds(seconds),
                _ => Budget::Steps,
            },
            out: self.out.clone(),
        };
        let stop = stop_flag()?;
        let found = compare::compare(&grid, &mut Bars { out, bar: TrainBar::new(out) }, &stop)?;
        write(&self.out.join("comparison.json"), &(serde_json::to_string_pretty(&found)? + "\n"))?;
        write(&self.out.join("comparison.md"), &found.markdown())?;
        found.write_report(&self.out.join("report.html"), &command_line())?;
        let standing = found.standings.len();
        out.result(&Shown(found))?;
        out.message(format!("report in {}", self.out.join("report.html").display()));
        if standing == 0 {
            bail!("no run ended well");
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    Ok(atomic::write(path, |file| file.write_all(text.as_bytes()))?)
}
