//! The loop itself: windows of batches to gradients to updates, with evaluation, checkpoints and a way back from any stop.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Var;
use espalier_adapters::Flow;
use espalier_data::Batch;

use crate::checkpoint::{self, Best, State};
use crate::dynamics::{Dynamics, Moving, Rates};
use crate::live::Watch;
use crate::objective::Targets;
use crate::observer::Observer;
use crate::optimizer::schedule::Schedule;
use crate::optimizer::{Optimizer, global_norm};
use crate::run::metrics::{EvalRecord, StepRecord};
use crate::tape::{self, Gradients, Start};
use crate::trainer::{Outcome, Run};
use crate::{Error, Result, memory};

/// The moving parts of a run.
pub(crate) struct Training<'a> {
    run: &'a mut Run,
    checkpoints: Option<PathBuf>,
    optimizer: Optimizer,
    dynamics: Box<dyn Dynamics>,
    schedule: Schedule,
    gradients: Gradients,
    pub(crate) state: State,
    total: usize,
    resumed_from: Option<usize>,
    last_saved: Option<usize>,
    loss: f64,
    eval_loss: Option<f64>,
    began: Instant,
    first_step_s: Option<f64>,
    timed: (u64, f64),
    stopped: bool,
    early_stopped: bool,
    watch: Watch,
    notices: Vec<String>,
}

/// What the dynamics of a run sees after `step` of `total` steps.
fn moving<'b>(run: &'b mut Run, optimizer: &'b mut Optimizer, step: usize, total: usize) -> Result<Moving<'b>> {
    let Run { recipe, model, adapters, name, parameters, .. } = run;
    let attached = adapters.get(name)?;
    Ok(Moving { model, attached, parameters, optimizer, step, total, seed: recipe.seed })
}

impl<'a> Training<'a> {
    pub(crate) fn new(run: &'a mut Run, checkpoints: Option<&Path>, resume: bool) -> Result<Self> {
        let mut dynamics = run.dynamics()?;
        let parameters = run
            .parameters
            .trainable()
            .map(|p| Ok((p.name.clone(), p.var()?)))
            .collect::<Result<Vec<(String, Var)>>>()?;
        let factors: Vec<f64> = run.parameters.trainable().map(|p| dynamics.factor(p)).collect();
        let mut optimizer = Optimizer::new(&run.recipe, parameters, factors.clone())?;
        let total = run.total_steps()?;
        let mut state = State { identity: run.identity()?, ..State::default() };
        let mut resumed_from = None;
        let mut notices = Vec::new();
        if let (true, Some(folder)) = (resume, checkpoints) {
            // A run killed before its first checkpoint starts again, to the same bits.
            resumed_from = Some(0);
            notices.extend(checkpoint::recover(folder)?);
            if let Some((_, newest)) = checkpoint::list(folder).pop() {
                let saved = checkpoint::read_state(&newest)?.identity;
                let changes = saved.changes(&state.identity);
                if !changes.is_empty() {
                    return Err(Error::Changed { path: newest, changes });
                }
                notices.extend(saved.notices(&state.identity));
                let identity = std::mem::take(&mut state.identity);
                let mut moving = moving(run, &mut optimizer, 0, total)?;
                state = State { identity, ..checkpoint::restore(&newest, &mut *dynamics, &mut moving)? };
                resumed_from = Some(state.step);
            } else {
                notices
                    .push(format!("{} holds no checkpoint: the run starts again from its beginning", folder.display()));
            }
        }
        if state.step == 0 {
            dynamics.begin(&mut moving(run, &mut optimizer, 0, total)?)?;
        }
        let attached = run.adapters.get(&run.name)?;
        attached.config.method.check_schedule(total)?;
        let watch = Watch::new(&run.parameters, &factors, attached, run.recipe.adam_eps)?;
        let loss = if state.step > 0 { state.loss } else { f64::NAN };
        Ok(Self {
            checkpoints: checkpoints.map(Path::to_owned),
            schedule: Schedule::new(&run.recipe, total),
            gradients: Gradients::new(&run.parameters),
            watch,
            notices,
            optimizer,
            dynamics,
            run,
            last_saved: resumed_from.filter(|step| *step > 0),
            resumed_from,
            state,
            total,
            loss,
            eval_loss: None,
            began: Instant::now(),
            first_step_s: None,
            timed: (0, 0.0),
            stopped: false,
            early_stopped: false,
        })
    }

    /// Trains to the end, or until `stop` is set.
    pub(crate) fn run(mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Outcome> {
        observer.start(self.state.step, self.total);
        for notice in std::mem::take(&mut self.notices) {
            observer.notice(&notice);
        }
        let (step, total) = (self.state.step, self.total);
        self.dynamics.enter(&mut moving(self.run, &mut self.optimizer, step, total)?)?;
        self.catch_up(observer)?;
        while self.state.step < self.total && !self.early_stopped {
            self.step(observer)?;
            let stopping = stop.load(Ordering::Relaxed);
            let epoch_end = self.state.batch == 0;
            self.after_step(epoch_end, stopping, observer)?;
            if stopping {
                self.stopped = self.state.step < self.total;
                break;
            }
        }
        self.finish(observer)
    }

    /// The micro-batches of the next step, all of one epoch, and moves on past them.
    fn window(&mut self) -> Result<Vec<(Batch, Targets)>> {
        let train = &self.run.data.train;
        let available = train.len_per_epoch(self.state.epoch)?;
        let count = self.run.recipe.accumulation.min(available - self.state.batch.min(available));
        let window = (0..count)
            .map(|i| {
                let batch = train.batch(self.state.epoch, self.state.batch + i)?;
                let targets = self.run.objective.targets(&batch)?;
                Ok((batch, targets))
            })
            .collect::<Result<Vec<_>>>()?;
        self.state.batch += count;
        if self.state.batch >= available {
            self.state.epoch += 1;
            self.state.batch = 0;
        }
        Ok(window)
    }

    fn step(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let started = Instant::now();
        let (step, total) = (self.state.step, self.total);
        self.dynamics.before(&mut moving(self.run, &mut self.optimizer, step, total)?)?;
        let window = self.window()?;
        let weight: usize = window.iter().map(|(_, targets)| targets.weight()).sum();
        if weight == 0 {
            return Err(Error::recipe(
                "data",
                format!("step {}: no token of its rows is trained on", self.state.step + 1),
            ));
        }
        let recipe = &self.run.recipe;
        let awake = |i: usize| self.dynamics.asleep(i).is_none();
        let start = Start::of(&self.run.model, &self.run.parameters, awake);
        let mut losses = Vec::with_capacity(window.len());
        let mut tokens = 0u64;
        for (part, (batch, targets)) in window.iter().enumerate() {
            let flow = Flow::train(recipe.seed, step as u64, part as u64);
            let flow = self.dynamics.flow(flow, step, part);
            let how = (1.0 / weight as f64, recipe.checkpointing);
            losses.push(tape::accumulate(&self.run.model, batch, targets, &flow, start, how, &mut self.gradients)?);
            tokens += batch.segments.iter().filter(|s| **s != espalier_data::PADDING).count() as u64;
        }
        let penalties = self.gradients.add_penalties(self.run.adapters.get(&self.run.name)?)?;
        if let (None, (taped @ 1.., all)) = (self.first_step_s, losses.first().map_or((0, 0), |l| l.taped))
            && !self.run.model.device().is_cpu()
        {
            observer.notice(&format!(
                "{taped} of {all} blocks run operation by operation on this device, many times slower than through its kernels: \
                 these take bf16, heads of 64 or 128 and norms before the blocks, on compute capability 9"
            ));
        }
        // Read last: until here a device is only given work.
        let loss = losses.iter().map(tape::Loss::value).sum::<Result<f64>>()? / weight as f64;
        self.finite("the loss", loss)?;
        let norm = global_norm(self.gradients.sums())?;
        self.finite("the gradient's norm", norm)?;
        self.fill_gradients()?;
        let recipe = &self.run.recipe;
        let clip = recipe.max_grad_norm;
        let scale = if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let lr = recipe.lr * self.schedule.factor(step) * self.dynamics.rate(step);
        self.watch.gradients(self.gradients.sums(), scale, lr)?;
        let rates = Rates { lr, scale };
        let mut moving = moving(self.run, &mut self.optimizer, step, total)?;
        self.dynamics.gradients(&mut moving, self.gradients.sums_mut(), rates)?;
        self.dynamics.update(&mut moving, self.gradients.sums(), rates)?;
        moving.step += 1;
        self.dynamics.after(&mut moving)?;
        self.gradients.clear();
        let seconds = started.elapsed().as_secs_f64();
        if self.first_step_s.is_none() {
            self.first_step_s = Some(crate::process_seconds());
        } else {
            self.timed.0 += tokens;
            self.timed.1 += seconds;
        }
        let mut extra = self.dynamics.metrics();
        extra.extend(penalties.into_iter().map(|(name, value)| (name.to_owned(), value.into())));
        self.loss = loss;
        self.state.loss = loss;
        self.state.step += 1;
        self.state.tokens += tokens;
        self.state.trained_tokens += weight as u64;
        self.state.elapsed_s += seconds;
        observer.step(&StepRecord {
            step: self.state.step as u64,
            loss,
            lr,
            grad_norm: Some(norm),
            tokens,
            trained_tokens: weight as u64,
            tokens_per_s: tokens as f64 / seconds,
            elapsed_s: self.state.elapsed_s,
            memory_bytes: memory::resident(),
            share_of_floor: None,
            extra,
        })
    }

    fn finite(&self, what: &'static str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let newest = self.checkpoints.as_deref().and_then(|f| checkpoint::list(f).pop());
        let checkpoint = newest.map_or_else(|| "none".to_owned(), |(_, path)| path.display().to_string());
        Err(Error::NotFinite { step: self.state.step + 1, what, value, checkpoint })
    }

    /// A trainable tensor that no gradient can reach is not trained: an error, not a flat curve. Token rows that are not in
    /// the window have a gradient of 0.
    fn fill_gradients(&mut self) -> Result<()> {
        for i in 0..self.gradients.sums().len() {
            if self.dynamics.asleep(i).is_some() {
                self.gradients.drop(i);
                continue;
            }
            if !self.watch.may_be_absent(i) && self.gradients.sums()[i].is_none() {
                return Err(Error::run(self.watch.name(i), "is trainable, but no gradient reaches it"));
            }
            self.gradients.fill(i)?;
        }
        Ok(())
    }

    fn after_step(&mut self, epoch_end: bool, stopping: bool, observer: &mut dyn Observer) -> Result<()> {
        let (eval_every, save_every) = (self.run.recipe.eval_every, self.run.recipe.save_every);
        let step = self.state.step;
        let due = |every: usize| if every == 0 { epoch_end } else { step.is_multiple_of(every) };
        let last = step >= self.total;
        // Before anything is saved from which the run could go on past a fault.
        self.watch(last || stopping, observer)?;
        // A stop does not wait for an evaluation: it is made up for when the run goes on.
        if last || (!stopping && due(eval_every)) {
            self.evaluate(observer)?;
        }
        self.watch(self.early_stopped, observer)?;
        if due(save_every) || last || stopping || self.early_stopped {
            self.save(observer)?;
        }
        Ok(())
    }

    /// Looks at the trained tensors when the first steps are taken, or at the `end` of fewer.
    fn watch(&mut self, end: bool, observer: &mut dyn Observer) -> Result<()> {
        if let Some(found) = self.watch.found(end, &|i| self.dynamics.still(i))? {
            if !found.still.is_empty() {
                observer.notice(&found.to_string());
            }
            self.state.live = Some(found);
        }
        Ok(())
    }

    /// What the run still owed when it was left: an evaluation that a stop passed over, or the end by early stopping.
    fn catch_up(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let (eval_every, patience) = (self.run.recipe.eval_every, self.run.recipe.early_stopping);
        let step = self.state.step;
        if step == 0 {
            return Ok(());
        }
        let due = if eval_every == 0 { self.state.batch == 0 } else { step.is_multiple_of(eval_every) };
        if (due || step >= self.total) && self.state.evaluated != Some(step) {
            self.evaluate(observer)?;
            self.save(observer)?;
        }
        self.early_stopped = patience > 0 && self.state.since_best >= patience;
        Ok(())
    }

    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let began = Instant::now();
        let Some((loss, weight)) = self.run.evaluate()? else { return Ok(()) };
        self.eval_loss = Some(loss);
        self.state.evaluated = Some(self.state.step);
        // The record comes before the checkpoint: a run that goes on from there has it already.
        observer.evaluation(&EvalRecord {
            step: self.state.step as u64,
            eval_loss: loss,
            eval_tokens: weight as u64,
            eval_s: began.elapsed().as_secs_f64(),
            extra: serde_json::Map::new(),
        })?;
        if !loss.is_finite() {
            observer.notice(&format!(
                "the evaluation at step {} gave {loss}: it counts as no better than any other",
                self.state.step
            ));
        }
        if loss.is_finite() && self.state.best.is_none_or(|best| loss < best.loss) {
            self.state.best = Some(Best { step: self.state.step, loss });
            self.state.since_best = 0;
            self.save(observer)?;
        } else {
            self.state.since_best += 1;
            let patience = self.run.recipe.early_stopping;
            self.early_stopped = patience > 0 && self.state.since_best >= patience;
        }
        Ok(())
    }

    fn save(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let Some(folder) = &self.checkpoints else { return Ok(()) };
        // An evaluation at this step changes the state after the first write, so a second write is needed then.
        let best_here = self.state.best.is_some_and(|b| b.step == self.state.step);
        if self.last_saved == Some(self.state.step) && !best_here && self.state.evaluated != Some(self.state.step) {
            return Ok(());
        }
        let path = checkpoint::save(folder, &self.state, &self.run.parameters, &self.optimizer, &*self.dynamics)?;
        checkpoint::prune(folder, self.run.recipe.keep_checkpoints, self.state.best.map(|b| b.step))?;
        self.last_saved = Some(self.state.step);
        observer.checkpoint(&path);
        Ok(())
    }

    fn finish(mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        let (step, total) = (self.state.step, self.total);
        if let (true, false, Some(best), Some(folder)) =
            (self.run.recipe.load_best, self.stopped, self.state.best, self.checkpoints.as_deref())
            && best.step != self.state.step
        {
            let path = folder.join(checkpoint::folder_name(best.step));
            let mut moving = moving(self.run, &mut self.optimizer, step, total)?;
            checkpoint::restore_values(&path, &mut *self.dynamics, &mut moving)?;
            observer
                .notice(&format!("finished with the weights of step {} (evaluation loss {:.4})", best.step, best.loss));
        }
        self.dynamics.leave(&mut moving(self.run, &mut self.optimizer, step, total)?)?;
        Ok(Outcome {
            steps: self.state.step,
            resumed_from: self.resumed_from,
            loss: self.loss,
            eval_loss: self.eval_loss,
            best: self.state.best.map(|b| (b.step, b.loss)),
            stopped: self.stopped,
            early_stopped: self.early_stopped,
            seconds: self.began.elapsed().as_secs_f64(),
            first_step_s: self.first_step_s.unwrap_or_default(),
            tokens: self.state.tokens,
            trained_tokens: self.state.trained_tokens,
            tokens_per_s: if self.timed.1 > 0.0 { self.timed.0 as f64 / self.timed.1 } else { 0.0 },
            peak_memory_bytes: memory::peak_on(self.run.model.device())?,
            trainable_parameters: self.run.parameters.trainable_count(),
            live: self.state.live,
        })
    }
}
