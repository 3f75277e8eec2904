//! Processes that trials start and kill: each runs one recipe in its folder.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use espalier_adapters::formats::atomic::with_kill_before;
use espalier_train::memory::{self, Estimate};
use espalier_train::{Recipe, Silent};
use serde::{Deserialize, Serialize};

use crate::runs;

/// How a process that runs [`main`] is started: a program and what comes before the job's path.
#[derive(Debug, Clone)]
pub struct Worker {
    /// The program.
    pub program: PathBuf,
    /// Its first arguments.
    pub arguments: Vec<OsString>,
}

/// What a worker does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// The recipe, as TOML.
    pub recipe: String,
    /// Whether it goes on from the newest checkpoint.
    pub resume: bool,
    /// Stand still before this rename or removal (from 0), to be killed there.
    pub stand_still: Option<u32>,
}

/// The file by which a worker says that it stands still.
fn marker(job: &Path) -> PathBuf {
    job.with_extension("still")
}

/// Does the job in the file at `path`.
///
/// # Errors
/// If it cannot be read, or the run fails.
pub fn main(path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let job: Job = serde_json::from_str(&text)?;
    let recipe = Recipe::parse(&job.recipe, "job")?;
    let run = || runs::planned(&recipe, job.resume, &mut Silent);
    memory::keep_freed();
    let (plan, _) = match job.stand_still {
        // On a thread of the pool, as the command does it.
        None => rayon::scope(|_| run())?,
        Some(n) => {
            let marker = marker(path);
            // The hook runs where the panic begins, before anything is unwound; from here only a kill ends this thread.
            std::panic::set_hook(Box::new(move |_| {
                let _ = std::fs::write(&marker, "");
                loop {
                    std::thread::park();
                }
            }));
            with_kill_before(n, run)?
        }
    };
    let memory = Memory { told: plan.memory, peak: memory::peak().unwrap_or(0) };
    std::fs::write(memory_file(path), serde_json::to_string(&memory)?)?;
    Ok(())
}

/// The memory of a worker's run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Memory {
    /// What was told before it began.
    pub told: Estimate,
    /// The most that the process held at once (`VmHWM`), in bytes.
    pub peak: u64,
}

/// Where a worker that came to its end leaves what it took.
fn memory_file(job: &Path) -> PathBuf {
    job.with_extension("memory")
}

/// What the worker of the job in `file` left, which came to its end.
///
/// # Errors
/// If there is nothing.
pub fn memory_of(file: &Path) -> Result<Memory> {
    let path = memory_file(file);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// A worker at work.
#[derive(Debug)]
pub struct Running {
    child: Child,
    job: PathBuf,
    began: Instant,
}

/// How often a worker is looked at.
const LOOK: Duration = Duration::from_millis(1);
/// Longest that a worker may take.
const PATIENCE: Duration = Duration::from_secs(120);

impl Worker {
    /// Starts a process for `job`, whose files lie beside `file`; `threads` is the number of its threads, where it matters.
    ///
    /// # Errors
    /// If the files cannot be written or the process cannot be started.
    pub fn start(&self, job: &Job, file: &Path, threads: Option<usize>) -> Result<Running> {
        std::fs::write(file, serde_json::to_string(job)?)?;
        let _ = std::fs::remove_file(marker(file));
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg(file).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(file.with_extension("error"))?);
        if let Some(threads) = threads {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        let child = command.spawn().with_context(|| self.program.display().to_string())?;
        Ok(Running { child, job: file.to_owned(), began: Instant::now() })
    }

    /// Starts a process for `job` and waits until it succeeds; gives the time it took.
    ///
    /// # Errors
    /// If it cannot be started or does not succeed.
    pub fn finish(&self, job: &Job, file: &Path, threads: Option<usize>) -> Result<Duration> {
        let mut running = self.start(job, file, threads)?;
        let (status, took) = running.ended()?;
        if !status.success() {
            bail!("the worker failed: {}", running.said());
        }
        Ok(took)
    }
}

impl Running {
    /// What it wrote to its standard error.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.job.with_extension("error")).unwrap_or_default().trim().to_owned()
    }

    fn ended(&mut self) -> Result<(ExitStatus, Duration)> {
        let status = self.child.wait()?;
        Ok((status, self.began.elapsed()))
    }

    /// Kills it (SIGKILL) after `wait`, or, without one, where it stands still. Whether there was something to kill: a worker
    /// that came to its end before is none.
    ///
    /// # Errors
    /// If it fails by itself.
    pub fn kill(mut self, wait: Option<Duration>) -> Result<bool> {
        let still = marker(&self.job);
        loop {
            if let Some(status) = self.child.try_wait()? {
                if !status.success() {
                    bail!("the worker failed: {}", self.said());
                }
                return Ok(false);
            }
            let now = match wait {
                Some(wait) => self.began.elapsed() >= wait,
                None => still.exists(),
            };
            if now || self.began.elapsed() > PATIENCE {
                // On Unix this is SIGKILL: nothing of the process runs any more.
                self.child.kill()?;
                let status = self.child.wait()?;
                return Ok(now && !status.success());
            }
            std::thread::sleep(LOOK);
        }
    }
}
