//! Limits of a pod's traffic, as annotations of Kubernetes ask for them.

use std::collections::BTreeMap;

/// Rates that kubelet's own limits allow, in bits per second.
const RATES: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// Most bits per second; `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Bandwidth {
    /// To the pod.
    pub ingress: Option<u64>,
    /// From the pod.
    pub egress: Option<u64>,
}

impl Bandwidth {
    /// What `kubernetes.io/ingress-bandwidth` and `kubernetes.io/egress-bandwidth` say; an error names the annotation.
    pub(super) fn of(annotations: &BTreeMap<String, String>) -> Result<Bandwidth, String> {
        let rate = |direction: &str| {
            let annotation = format!("kubernetes.io/{direction}-bandwidth");
            let Some(text) = annotations.get(&annotation) else { return Ok(None) };
            match quantity(text).filter(|rate| RATES.contains(rate)) {
                Some(rate) => Ok(Some(rate)),
                None => Err(format!("annotation {annotation} {text:?} is no rate between 1k and 1P bits per second")),
            }
        };
        Ok(Bandwidth { ingress: rate("ingress")?, egress: rate("egress")? })
    }
}

/// A Kubernetes quantity as a whole number: `10M`, `1.5Gi`, `2e6`. `None`: it is none.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let factor: u128 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        exponent => 10_u128.checked_pow(exponent.strip_prefix(['e', 'E'])?.parse().ok()?)?,
    };
    if fraction.len() > 9 || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let parts = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<u128>().ok() };
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let scaled = parts(whole)?.checked_mul(scale)?.checked_add(parts(fraction)?)?.checked_mul(factor)?;
    u64::try_from(scaled.div_ceil(scale)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_does() {
        for (text, expected) in [
            ("10M", Some(10_000_000)),
            ("1.5Gi", Some(1_610_612_736)),
            ("2e6", Some(2_000_000)),
            ("1000", Some(1000)),
            ("0.0015k", Some(2)),
            (".5k", Some(500)),
            ("", None),
            ("M", None),
            ("10m", None),
            ("1.2.3", None),
            ("-1", None),
            ("99999999999999999999P", None),
        ] {
            assert_eq!(quantity(text), expected, "{text}");
        }
    }

    #[test]
    fn a_wrong_annotation_is_named() {
        let of = |text: &str| Bandwidth::of(&BTreeMap::from([("kubernetes.io/egress-bandwidth".to_owned(), text.to_owned())]));
        assert_eq!(of("10M"), Ok(Bandwidth { ingress: None, egress: Some(10_000_000) }));
        for wrong in ["1", "2e15", "fast"] {
            assert!(of(wrong).unwrap_err().starts_with("annotation kubernetes.io/egress-bandwidth"), "{wrong}");
        }
    }
}
