//! Samples by measure and runtime, and the table made of them.

use std::collections::BTreeMap;

/// Samples of each measure, in the order in which the measures came, for each runtime in the order given.
#[derive(Debug, Default)]
pub(super) struct Table {
    columns: Vec<String>,
    rows: Vec<(String, BTreeMap<usize, Vec<f64>>)>,
}

/// What lies at this share of the sorted samples.
pub(super) fn at(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1) as f64;
    sorted.get((last * share).round() as usize).copied().unwrap_or(f64::NAN)
}

impl Table {
    /// Takes one sample.
    pub(super) fn add(&mut self, measure: &str, runtime: &str, value: f64) {
        let column = self.columns.iter().position(|name| name == runtime).unwrap_or_else(|| {
            self.columns.push(runtime.to_owned());
            self.columns.len() - 1
        });
        let row = self.rows.iter().position(|(name, _)| name == measure).unwrap_or_else(|| {
            self.rows.push((measure.to_owned(), BTreeMap::new()));
            self.rows.len() - 1
        });
        if let Some((_, cells)) = self.rows.get_mut(row) {
            cells.entry(column).or_default().push(value);
        }
    }

    /// Markdown: medians, 95th percentiles where there are ten samples or more, and how many times the first runtime's a median is.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!("| | {} |\n|---|{}\n", self.columns.join(" | "), "---|".repeat(self.columns.len()));
        for (measure, cells) in &self.rows {
            let first = cells.get(&0).map(|samples| at(samples, 0.5));
            text.push_str(&format!("| {measure} |"));
            for column in 0..self.columns.len() {
                text.push_str(&format!(" {} |", cells.get(&column).map_or("-".into(), |samples| cell(samples, column, first))));
            }
            text.push('\n');
        }
        text
    }
}

fn cell(samples: &[f64], column: usize, first: Option<f64>) -> String {
    let median = at(samples, 0.5);
    let mut text = number(median);
    if samples.len() >= 10 {
        text.push_str(&format!(" ({})", number(at(samples, 0.95))));
    }
    match first {
        Some(first) if column > 0 && first > 0.0 => text.push_str(&format!(", {:.1}x", median / first)),
        _ => {}
    }
    text
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Table, at};

    #[test]
    fn a_ratio_is_to_the_first_runtime() {
        let mut table = Table::default();
        for value in [3.0, 1.0, 2.0] {
            table.add("pull", "one", value);
        }
        table.add("pull", "two", 5.0);
        table.add("other", "two", 5.0);
        assert_eq!(table.markdown(), "| | one | two |\n|---|---|---|\n| pull | 2.00 | 5.00, 2.5x |\n| other | - | 5.00 |\n");
    }

    #[test]
    fn the_share_of_no_samples_is_no_number() {
        assert!(at(&[], 0.5).is_nan());
        assert!((at(&[1.0, 2.0, 3.0], 1.0) - 3.0).abs() < 1e-9);
    }
}
