//! The formats of cgroup v2 files (kernel: admin-guide/cgroup-v2) and of /proc/net/dev. Pure.

use windlass_proto::cri::{PsiData, PsiStats};

/// Lines of `key number`; others are skipped.
pub(super) fn keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// A single number; `max` is none.
pub(super) fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A pressure file.
pub(super) fn pressure(text: &str) -> Option<PsiStats> {
    let mut stats = PsiStats::default();
    for line in text.lines() {
        let mut words = line.split(' ');
        let kind = words.next()?;
        let mut data = PsiData::default();
        for word in words {
            match word.split_once('=')? {
                ("avg10", value) => data.avg10 = value.parse().ok()?,
                ("avg60", value) => data.avg60 = value.parse().ok()?,
                ("avg300", value) => data.avg300 = value.parse().ok()?,
                ("total", value) => data.total = value.parse().ok()?,
                _ => {}
            }
        }
        match kind {
            "some" => stats.some = Some(data),
            "full" => stats.full = Some(data),
            _ => {}
        }
    }
    stats.some.is_some().then_some(stats)
}

/// The counters of one line of /proc/net/dev.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// Interfaces and their counters, as /proc/net/dev lists them.
pub(super) fn interfaces(text: &str) -> Vec<(String, Traffic)> {
    let parse = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let numbers: Vec<u64> = rest.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx_bytes, tx_packets, tx_errors, tx_dropped, ..] =
            numbers[..]
        else {
            return None;
        };
        let traffic = Traffic { rx_bytes, rx_packets, rx_errors, rx_dropped, tx_bytes, tx_packets, tx_errors, tx_dropped };
        Some((name.trim().to_owned(), traffic))
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formats_of_the_kernel() {
        let found: Vec<_> = keyed("usage_usec 12\nuser_usec 7\nodd line here\n").collect();
        assert_eq!(found, [("usage_usec", 12), ("user_usec", 7)]);
        assert_eq!((number("4096\n"), number("max\n")), (Some(4096), None));
        let psi = pressure("some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n");
        let psi = psi.expect("pressure");
        let (some, full) = (psi.some.expect("some"), psi.full.expect("full"));
        assert_eq!((some.avg10, some.avg60, some.total, full.total), (1.5, 0.25, 77, 5));
        assert_eq!(pressure(""), None);
    }

    #[test]
    fn interfaces_with_and_without_a_space_after_the_colon() {
        let text = "Inter-|   Receive\n face |bytes packets\n    lo: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n  eth0:10 2 0 0 0 0 0 0 50 6 0 0 0 0 0 0\n";
        let found = interfaces(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].0.as_str(), found[0].1.rx_errors, found[0].1.tx_dropped), ("lo", 3, 8));
        assert_eq!((found[1].0.as_str(), found[1].1.rx_bytes, found[1].1.tx_bytes), ("eth0", 10, 50));
    }
}
