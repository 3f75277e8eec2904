//! Packing, mixing and dealing: every token once, exact proportions, the same batches after a stop.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_data::{
    Batch, BatchOptions, Batcher, DataError, Example, IGNORE, Mixture, PADDING, Packing, Part, SplitSize, TokenStore,
    pack, split,
};
use proptest::prelude::*;

/// Examples of these lengths; token t of example n is 1000 n + t, so that every token of a batch tells where it comes from.
fn store(lengths: &[usize]) -> Arc<TokenStore> {
    let examples = lengths.iter().enumerate().map(|(n, &length)| {
        let input_ids: Vec<u32> = (0..length as u32).map(|t| 1000 * n as u32 + t).collect();
        let labels = input_ids.iter().map(|id| if id.is_multiple_of(3) { IGNORE } else { *id as i32 }).collect();
        Example { input_ids, labels, class: (n % 2 == 0).then_some(n as u32), ..Example::default() }
    });
    Arc::new(TokenStore::from_examples(examples).unwrap())
}

fn options(change: impl FnOnce(&mut BatchOptions)) -> BatchOptions {
    let mut options = BatchOptions { batch_size: 4, pad_id: 9, ..Default::default() };
    change(&mut options);
    options
}

fn all(batcher: &Batcher, epoch: u64) -> Vec<Batch> {
    (0..batcher.len_per_epoch(epoch).unwrap()).map(|index| batcher.batch(epoch, index).unwrap()).collect()
}

/// Checks the invariants of a batch and returns the tokens of its examples by example.
fn check(batch: &Batch, pad_id: u32) -> BTreeMap<u32, Vec<u32>> {
    let size = batch.rows * batch.cols;
    assert_eq!([batch.ids.len(), batch.labels.len(), batch.positions.len(), batch.segments.len()], [size; 4]);
    let mut found: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut examples = 0;
    for row in 0..batch.rows {
        let mut segment = 0;
        let mut padding = false;
        for at in row * batch.cols..(row + 1) * batch.cols {
            if batch.segments[at] == PADDING {
                padding = true;
                assert_eq!((batch.ids[at], batch.labels[at], batch.positions[at]), (pad_id, IGNORE, 0));
                continue;
            }
            assert!(!padding, "padding is on the right only");
            let (example, t) = (batch.ids[at] / 1000, batch.ids[at] % 1000);
            assert_eq!(batch.positions[at], t, "positions begin at 0 in each example");
            if t == 0 {
                segment = batch.segments[at];
                examples += 1;
                assert_eq!(batch.labels[at], IGNORE, "nothing predicts the first token");
            } else {
                let label = if batch.ids[at].is_multiple_of(3) { IGNORE } else { batch.ids[at] as i32 };
                assert_eq!(batch.labels[at], label);
            }
            assert_eq!(batch.segments[at], segment);
            found.entry(example).or_default().push(t);
        }
    }
    assert_eq!(batch.trained_tokens, batch.labels.iter().filter(|label| **label != IGNORE).count());
    assert_eq!([batch.classes.len(), batch.sources.len(), batch.draws.len()], [examples; 3]);
    found
}

#[test]
fn without_shuffling_the_order_is_that_of_the_data() {
    let store = store(&[3, 1, 5, 2, 4]);
    let batcher = Batcher::single(store, options(|o| (o.shuffle, o.batch_size) = (false, 2))).unwrap();
    for epoch in [0, 7] {
        let batches = all(&batcher, epoch);
        assert_eq!(batches.len(), 3);
        let order: Vec<usize> = batches.iter().flat_map(|b| b.draws.iter().map(|d| d.index)).collect();
        assert_eq!(order, vec![0, 1, 2, 3, 4]);
        assert_eq!((batches[0].rows, batches[0].cols), (2, 3));
        assert_eq!(batches[0].ids, vec![0, 1, 2, 1000, 9, 9]);
        assert_eq!(batches[0].segments, vec![0, 0, 0, 0, PADDING, PADDING]);
        assert_eq!(batches[0].classes, vec![0, PADDING]);
        assert_eq!(batches[2].rows, 1);
    }
}

#[test]
fn last_batches_and_widths() {
    let store = store(&[3, 1, 5, 2, 4]);
    let drop = Batcher::single(store.clone(), options(|o| (o.drop_last, o.batch_size) = (true, 2))).unwrap();
    assert_eq!(drop.len_per_epoch(0).unwrap(), 2);
    let wide = Batcher::single(store, options(|o| o.pad_to_multiple = 8)).unwrap();
    assert!(all(&wide, 0).iter().all(|batch| batch.cols == 8));
}

#[test]
fn senseless_options_are_named() {
    let store = store(&[3, 6]);
    let error = |o: BatchOptions| Batcher::single(store.clone(), o).unwrap_err();
    assert!(error(options(|o| o.batch_size = 0)).to_string().contains("batch_size"));
    assert!(error(options(|o| o.packing = Packing::BestFit)).to_string().contains("max_length"));
    let long = error(options(|o| o.max_length = Some(5)));
    assert!(matches!(long, DataError::TooLong { index: 1, length: 6, max_length: 5 }), "{long}");
    let batcher = Batcher::single(store.clone(), options(|_| ())).unwrap();
    assert!(batcher.batch(0, 1).unwrap_err().to_string().contains("batch 1 does not exist: there are 1"));
    assert!(Batcher::subset(store.clone(), &[2], options(|_| ())).is_err());
    assert!(Batcher::subset(store, &[], options(|_| ())).is_err());
}

#[test]
fn weights_are_met_exactly_and_every_example_seen_equally() {
    let (a, b, c) = (store(&[2; 10]), store(&[2; 7]), store(&[2; 100]));
    let parts = vec![Part::new(a).weight(1.0), Part::new(b).weight(2.0), Part::new(c).weight(7.0)];
    let mixture = Mixture::new(parts.clone(), Some(33)).unwrap();
    assert_eq!(mixture.counts(), &[3, 7, 23]);
    assert_eq!(Mixture::new(parts.clone(), None).unwrap().counts(), &[14, 29, 100]);
    for shuffle in [true, false] {
        let mut seen: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        for epoch in 0..100 {
            let draws = mixture.epoch(epoch, 5, shuffle);
            for (part, count) in mixture.counts().iter().enumerate() {
                assert_eq!(draws.iter().filter(|d| d.part == part).count(), *count);
            }
            draws.iter().for_each(|d| *seen.entry((d.part, d.index)).or_default() += 1);
        }
        for (at, part) in parts.iter().enumerate() {
            let of: Vec<usize> = seen.iter().filter(|((p, _), _)| *p == at).map(|(_, n)| *n).collect();
            assert_eq!(of.len(), part.len());
            assert!(of.iter().max().unwrap() - of.iter().min().unwrap() <= 1, "{of:?}");
        }
    }
    let even = mixture.epoch(0, 0, false);
    assert!(even[..11].iter().any(|d| d.part == 0) && even[22..].iter().any(|d| d.part == 0), "parts are interleaved");
}

#[test]
fn senseless_mixtures_are_named() {
    let part = || Part::new(store(&[2, 2]));
    assert!(Mixture::new(vec![], None).is_err());
    assert!(Mixture::new(vec![part().weight(-1.0)], None).unwrap_err().to_string().contains("weight"));
    assert!(Mixture::new(vec![part().weight(f64::NAN)], None).is_err());
    assert!(Mixture::new(vec![part().weight(0.0)], None).is_err());
    assert!(Mixture::new(vec![part()], Some(0)).is_err());
    assert_eq!(Mixture::new(vec![part().weight(0.0), part()], None).unwrap().counts(), &[0, 2]);
}

#[test]
fn a_resumed_run_sees_the_same_batches() {
    let lengths: Vec<usize> = (0..57).map(|n| 1 + n * 7 % 13).collect();
    for packing in [Packing::Off, Packing::BestFit, Packing::InOrder] {
        let make = |seed: u64| {
            let parts = vec![Part::new(store(&lengths)).weight(2.0), Part::new(store(&[4; 9])).weight(1.0)];
            let mixture = Mixture::new(parts, None).unwrap();
            Batcher::new(mixture, options(|o| (o.packing, o.max_length, o.seed) = (packing, Some(16), seed))).unwrap()
        };
        let (first, again, other) = (make(3), make(3), make(4));
        let batches = all(&first, 2);
        for index in (0..batches.len()).rev() {
            let _ = again.batch(0, 0).unwrap();
            assert_eq!(again.batch(2, index).unwrap(), batches[index], "{packing:?}");
        }
        assert_ne!(all(&first, 1), batches, "epochs differ");
        assert_ne!(all(&other, 2), batches, "seeds differ");
    }
}

#[test]
fn packing_in_order_keeps_the_order() {
    let store = store(&[5, 5, 5, 2, 9, 1]);
    let change = |o: &mut BatchOptions| (o.packing, o.max_length, o.shuffle) = (Packing::InOrder, Some(10), false);
    let batch = Batcher::single(store, options(change)).unwrap().batch(0, 0).unwrap();
    assert_eq!((batch.rows, batch.cols), (3, 10));
    assert_eq!(batch.draws.iter().map(|d| d.index).collect::<Vec<_>>(), vec![0, 1, 2, 3, 4, 5]);
    check(&batch, 9);
}

#[test]
fn splits_are_whole_and_seeded() {
    let (train, held) = split(100, SplitSize::Fraction(0.1), 1).unwrap();
    assert_eq!((train.len(), held.len()), (90, 10));
    let mut both: Vec<usize> = train.iter().chain(&held).copied().collect();
    both.sort_unstable();
    assert_eq!(both, (0..100).collect::<Vec<_>>());
    assert_eq!(split(100, SplitSize::Count(10), 1).unwrap(), (train.clone(), held));
    assert_ne!(split(100, SplitSize::Count(10), 2).unwrap().0, train);
    for bad in [
        SplitSize::Fraction(0.0),
        SplitSize::Fraction(1.0),
        SplitSize::Fraction(f64::NAN),
        SplitSize::Count(0),
        SplitSize::Count(100),
    ] {
        assert!(split(100, bad, 1).is_err(), "{bad:?}");
    }
    assert!(split(1, SplitSize::Fraction(0.5), 1).is_err());
    let store = store(&[2; 100]);
    let batcher = Batcher::subset(store, &train, options(|o| o.shuffle = false)).unwrap();
    let order: Vec<usize> = all(&batcher, 0).iter().flat_map(|b| b.draws.iter().map(|d| d.index)).collect();
    assert_eq!(order, train);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_token_of_an_epoch_occurs_once(
        lengths in prop::collection::vec(1usize..20, 1..60), seed in any::<u64>(), mode in 0usize..3, shuffle in any::<bool>(),
    ) {
        let packing = [Packing::Off, Packing::BestFit, Packing::InOrder][mode];
        let change = |o: &mut BatchOptions| (o.packing, o.max_length, o.seed, o.shuffle) = (packing, Some(24), seed, shuffle);
        let batcher = Batcher::single(store(&lengths), options(change)).unwrap();
        let mut found: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for batch in all(&batcher, 1) {
            prop_assert!(batch.cols <= 24 && batch.rows <= 4);
            for (example, tokens) in check(&batch, 9) {
                prop_assert!(found.insert(example, tokens).is_none());
            }
        }
        let expected: BTreeMap<u32, Vec<u32>> =
            lengths.iter().enumerate().map(|(n, &l)| (n as u32, (0..l as u32).collect())).collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn packed_rows_are_full_enough(lengths in prop::collection::vec(1usize..=50, 1..200)) {
        let total: usize = lengths.iter().sum();
        let fewest = total.div_ceil(50);
        for packing in [Packing::BestFit, Packing::InOrder] {
            let rows = pack(&lengths, 50, packing).unwrap();
            let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for row in &rows {
                prop_assert!(row.iter().map(|at| lengths[*at]).sum::<usize>() <= 50);
            }
            // No two neighbours (in order) or no two rows at all (best fit) would fit together.
            prop_assert!(rows.len() <= 2 * fewest);
        }
    }

    #[test]
    fn counts_differ_from_shares_by_less_than_one(weights in prop::collection::vec(0.0f64..10.0, 1..6), size in 1usize..500) {
        let sum: f64 = weights.iter().sum();
        prop_assume!(sum > 0.0);
        let one = store(&[1]);
        let parts = weights.iter().map(|w| Part::new(one.clone()).weight(*w)).collect();
        let mixture = Mixture::new(parts, Some(size)).unwrap();
        prop_assert_eq!(mixture.size(), size);
        for (weight, count) in weights.iter().zip(mixture.counts()) {
            prop_assert!((weight / sum * size as f64 - *count as f64).abs() < 1.0 + 1e-9);
        }
    }
}
