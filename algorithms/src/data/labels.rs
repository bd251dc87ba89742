//! The labels of a labelled set, and how they become class numbers: sorted, as numbers when all of
//! them are numbers, so that class `i` never depends on the order of the samples.

use std::collections::HashMap;

use super::limits::{LABEL_BYTES_MAX, LABELS_MAX};

/// Gives labels their numbers while samples are read.
#[derive(Debug)]
pub(super) struct LabelTable {
    names: Vec<String>,
    numbers: HashMap<String, u32>,
    is_fixed: bool,
}

impl LabelTable {
    /// Collects labels, or, with `expect`, takes only those.
    pub(super) fn new(expect: Option<&[String]>) -> Self {
        let names = expect.map(<[String]>::to_vec).unwrap_or_default();
        let numbers = names.iter().cloned().zip(0..).collect();
        Self { names, numbers, is_fixed: expect.is_some() }
    }

    /// The number of a label, or what is wrong with it.
    pub(super) fn number(&mut self, label: &str) -> Result<u32, String> {
        if let Some(number) = self.numbers.get(label) {
            return Ok(*number);
        }
        if label.is_empty() {
            return Err("the label is empty".into());
        }
        if self.is_fixed {
            const SHOWN: usize = 12;
            let shown: Vec<&str> = self.names.iter().take(SHOWN).map(String::as_str).collect();
            let more = if self.names.len() > SHOWN { ", …" } else { "" };
            return Err(format!(
                "label `{}` is not among the {} of the training channel ({}{more})",
                excerpt(label),
                self.names.len(),
                shown.join(", ")
            ));
        }
        if label.len() > LABEL_BYTES_MAX {
            return Err(format!(
                "label `{}` has {} bytes, expected at most {LABEL_BYTES_MAX}",
                excerpt(label),
                label.len()
            ));
        }
        if self.names.len() == LABELS_MAX {
            return Err(format!(
                "label `{}` is one more than the {LABELS_MAX} that are possible: is this column \
                 the label?",
                excerpt(label)
            ));
        }
        let number = self.names.len() as u32;
        self.names.push(label.to_owned());
        self.numbers.insert(label.to_owned(), number);
        Ok(number)
    }

    /// The labels in class order; `classes` are rewritten to it.
    pub(super) fn finish(self, classes: &mut [u32]) -> Vec<String> {
        if self.is_fixed {
            return self.names;
        }
        let mut order: Vec<u32> = (0..self.names.len() as u32).collect();
        let values: Option<Vec<f64>> =
            self.names.iter().map(|n| n.parse().ok().filter(|v: &f64| v.is_finite())).collect();
        order.sort_by(|&a, &b| {
            let (a, b) = (a as usize, b as usize);
            let by_name = self.names[a].cmp(&self.names[b]);
            values.as_ref().map_or(by_name, |v| v[a].total_cmp(&v[b]).then(by_name))
        });
        let mut number_of = vec![0; order.len()];
        for (new, &old) in (0..).zip(&order) {
            number_of[old as usize] = new;
        }
        for class in classes {
            *class = number_of[*class as usize];
        }
        order.iter().map(|&old| self.names[old as usize].clone()).collect()
    }
}

/// The beginning of a text that may be anything.
pub(super) fn excerpt(text: &str) -> String {
    const CHARACTERS: usize = 40;
    let mut shown: String = text.chars().take(CHARACTERS).flat_map(char::escape_debug).collect();
    if text.chars().nth(CHARACTERS).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(labels: &[&str]) -> (Vec<String>, Vec<u32>) {
        let mut table = LabelTable::new(None);
        let mut classes: Vec<u32> =
            labels.iter().map(|l| table.number(l).expect("a label")).collect();
        let names = table.finish(&mut classes);
        (names, classes)
    }

    #[test]
    fn numbers_sort_as_numbers_and_words_as_words() {
        let (names, classes) = order(&["10", "9", "-1", "10"]);
        assert_eq!(
            (names, classes),
            (vec!["-1".into(), "9".into(), "10".into()], vec![2, 1, 0, 2])
        );
        let (names, classes) = order(&["10", "9", "cat"]);
        assert_eq!((names, classes), (vec!["10".into(), "9".into(), "cat".into()], vec![0, 1, 2]));
    }

    #[test]
    fn labels_that_training_never_saw_are_refused() {
        let mut table = LabelTable::new(Some(&["cat".into(), "dog".into()]));
        assert_eq!(table.number("dog"), Ok(1));
        let text = table.number("d\u{7}oge").expect_err("unknown");
        assert!(text.contains("`d\\u{7}oge`") && text.contains("(cat, dog)"), "{text}");
    }
}
