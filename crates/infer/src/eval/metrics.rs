//! Scores of a confusion matrix: examples by class (row) and predicted label (column).
//!
//! Equation: precision = tp / (tp + fp), recall = tp / (tp + fn), F1 = 2 tp / (2 tp + fp + fn), 0 where undefined;
//!           MCC = (c s - sum_k p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)), c right ones of s, t_k of class k,
//!           p_k predicted as k; 0 where undefined
//! Source:   scikit-learn's `f1_score(average="macro")` and `matthews_corrcoef`; Gorodkin 2004 for many classes

use serde::{Deserialize, Serialize};

/// Scores of one class.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ClassScore {
    /// Share of those predicted as the class that are of it.
    pub precision: f64,
    /// Share of those of the class that were predicted so.
    pub recall: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
    /// Examples of the class.
    pub support: usize,
}

/// The matrix of `labels` classes for pairs of class and prediction; pairs outside it are left out.
pub fn confusion(pairs: &[(usize, usize)], labels: usize) -> Vec<Vec<usize>> {
    let mut matrix = vec![vec![0; labels]; labels];
    for (class, predicted) in pairs {
        if let Some(count) = matrix.get_mut(*class).and_then(|row| row.get_mut(*predicted)) {
            *count += 1;
        }
    }
    matrix
}

/// Right ones, of each class, and predicted as each class.
fn totals(matrix: &[Vec<usize>]) -> (Vec<usize>, Vec<usize>, Vec<usize>) {
    let right = matrix.iter().enumerate().map(|(k, row)| row.get(k).copied().unwrap_or(0)).collect();
    let classes = matrix.iter().map(|row| row.iter().sum()).collect();
    let predicted = (0..matrix.len()).map(|k| matrix.iter().filter_map(|row| row.get(k)).sum()).collect();
    (right, classes, predicted)
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole == 0.0 { 0.0 } else { part / whole }
}

/// Share of examples on the diagonal.
pub fn accuracy(matrix: &[Vec<usize>]) -> f64 {
    let (right, classes, _) = totals(matrix);
    ratio(right.iter().sum::<usize>() as f64, classes.iter().sum::<usize>() as f64)
}

/// Precision, recall and F1 of each class.
pub fn class_scores(matrix: &[Vec<usize>]) -> Vec<ClassScore> {
    let (right, classes, predicted) = totals(matrix);
    right
        .iter()
        .zip(classes)
        .zip(predicted)
        .map(|((&right, support), predicted)| ClassScore {
            precision: ratio(right as f64, predicted as f64),
            recall: ratio(right as f64, support as f64),
            f1: ratio(2.0 * right as f64, (support + predicted) as f64),
            support,
        })
        .collect()
}

/// Mean F1 over the classes that occur or were predicted.
pub fn macro_f1(matrix: &[Vec<usize>]) -> f64 {
    let (_, classes, predicted) = totals(matrix);
    let present = classes.iter().zip(&predicted).filter(|(t, p)| **t + **p > 0).count();
    ratio(class_scores(matrix).iter().map(|c| c.f1).sum(), present as f64)
}

/// Matthews correlation coefficient.
pub fn mcc(matrix: &[Vec<usize>]) -> f64 {
    let (right, classes, predicted) = totals(matrix);
    let sum = |values: &[usize]| values.iter().sum::<usize>() as f64;
    let dot = |a: &[usize], b: &[usize]| a.iter().zip(b).map(|(x, y)| *x as f64 * *y as f64).sum::<f64>();
    let (c, s) = (sum(&right), sum(&classes));
    let spread = (s * s - dot(&predicted, &predicted)) * (s * s - dot(&classes, &classes));
    ratio(c * s - dot(&predicted, &classes), spread.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} for {b}");
    }

    #[test]
    fn two_classes_by_hand() {
        // tp 4, fn 1, fp 2, tn 3: MCC = (4*3 - 2*1) / sqrt(6*5*5*4)
        let matrix = vec![vec![3, 2], vec![1, 4]];
        near(accuracy(&matrix), 0.7);
        near(mcc(&matrix), 10.0 / 600f64.sqrt());
        // F1: 2*3/(5+4) and 2*4/(5+6)
        near(macro_f1(&matrix), (6.0 / 9.0 + 8.0 / 11.0) / 2.0);
        let scores = class_scores(&matrix);
        near(scores[1].precision, 4.0 / 6.0);
        near(scores[1].recall, 0.8);
        assert_eq!(scores[0].support, 5);
    }

    #[test]
    fn three_classes_by_hand() {
        // y_true = [0,1,2,0,1,2], y_pred = [0,2,1,0,0,1]: the example of scikit-learn's f1_score, macro 0.2666..
        let matrix = confusion(&[(0, 0), (1, 2), (2, 1), (0, 0), (1, 0), (2, 1)], 3);
        assert_eq!(matrix, [[2, 0, 0], [1, 0, 1], [0, 2, 0]]);
        near(macro_f1(&matrix), 0.8 / 3.0);
        near(accuracy(&matrix), 1.0 / 3.0);
        // c s - sum p t = 2*6 - (3*2 + 2*2 + 1*2) = 0
        near(mcc(&matrix), 0.0);
    }

    #[test]
    fn the_examples_of_scikit_learn() {
        // matthews_corrcoef([+1, +1, +1, -1], [+1, -1, +1, +1]) = -0.33
        near(mcc(&confusion(&[(1, 1), (1, 0), (1, 1), (0, 1)], 2)), -1.0 / 3.0);
    }

    #[test]
    fn four_classes_as_scikit_learn() {
        let matrix = vec![vec![50, 3, 7, 0], vec![4, 20, 1, 5], vec![9, 2, 31, 6], vec![1, 0, 8, 13]];
        near(accuracy(&matrix), 0.7125);
        near(macro_f1(&matrix), 0.687_893_327_606_916_9);
        near(mcc(&matrix), 0.596_945_273_483_920_7);
    }

    #[test]
    fn classes_that_do_not_occur_do_not_count() {
        let matrix = confusion(&[(0, 0), (1, 1)], 5);
        near(macro_f1(&matrix), 1.0);
        near(mcc(&matrix), 1.0);
    }

    #[test]
    fn undefined_scores_are_zero() {
        near(accuracy(&[]), 0.0);
        near(macro_f1(&[]), 0.0);
        near(mcc(&confusion(&[(0, 0), (1, 0)], 2)), 0.0);
        near(mcc(&[]), 0.0);
    }
}
