//! A strict reader of Prometheus' text format (version 0.0.4), and a scrape.

use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

/// One scrape: values by name and labels, as `name{key="value"}` in the order of the text.
#[derive(Debug, Default)]
pub struct Scrape(BTreeMap<String, f64>);

/// Sends a request; returns the head and the body.
pub fn request(address: &str, request: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("connect {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("a head")?;
    Ok((head.to_owned(), body.to_owned()))
}

impl Scrape {
    pub fn take(address: &str) -> Result<Scrape> {
        let (head, body) = request(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
        ensure!(head.starts_with("HTTP/1.1 200 OK") && head.contains("text/plain; version=0.0.4"), "{head}");
        ensure!(head.contains(&format!("content-length: {}", body.len())), "{head}: {} bytes came", body.len());
        Scrape::parse(&body)
    }

    /// Fails at anything that the format does not allow, and at what it only advises against.
    pub fn parse(text: &str) -> Result<Scrape> {
        ensure!(text.ends_with('\n'), "the last line has no end");
        let (mut values, mut families) = (BTreeMap::new(), BTreeSet::new());
        let (mut help, mut family) = (None::<String>, None::<(String, String)>);
        for line in text.lines() {
            let broken = || format!("line {line:?}");
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, text) = rest.split_once(' ').with_context(broken)?;
                ensure!(is_name(name) && !text.is_empty() && families.insert(name.to_owned()), broken());
                help = Some(name.to_owned());
                family = None;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').with_context(broken)?;
                ensure!(help.as_deref() == Some(name), "{} comes without its help", broken());
                ensure!(["counter", "gauge", "histogram"].contains(&kind), broken());
                ensure!((kind == "counter") == name.ends_with("_total"), "{}: a name for another kind", broken());
                family = Some((name.to_owned(), kind.to_owned()));
            } else {
                let (series, value) = line.rsplit_once(' ').with_context(broken)?;
                let (name, labels) = series.split_once('{').map_or((series, None), |(name, rest)| (name, Some(rest)));
                let (family, kind) = family.as_ref().with_context(broken)?;
                let base = if kind == "histogram" {
                    ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).with_context(broken)?
                } else {
                    name
                };
                ensure!(base == family && is_name(name), "{} is of another family", broken());
                if let Some(labels) = labels {
                    check_labels(labels).with_context(broken)?;
                }
                let value: f64 = value.parse().with_context(broken)?;
                ensure!(value.is_finite() && (kind == "gauge" || value >= 0.0), broken());
                ensure!(values.insert(series.to_owned(), value).is_none(), "{} is told twice", broken());
            }
        }
        let scrape = Scrape(values);
        scrape.check_histograms()?;
        Ok(scrape)
    }

    /// Buckets only grow, and the last of them is the count.
    fn check_histograms(&self) -> Result<()> {
        let mut last: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for (series, value) in &self.0 {
            let Some((before, bound)) = series.split_once("le=\"") else { continue };
            let bound = bound.split('"').next().unwrap_or_default().replace("+Inf", "inf").parse::<f64>()?;
            last.entry(before.to_owned()).or_default().push((bound, *value));
        }
        for (series, mut buckets) in last {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            ensure!(buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{series}: {buckets:?}");
            let count = series.replacen("_bucket{", "_count{", 1);
            let count = count.trim_end_matches(',').to_owned();
            let count = if count.ends_with('{') { count.trim_end_matches('{').to_owned() } else { format!("{count}}}") };
            let last = buckets.last().filter(|last| last.0.is_infinite()).with_context(|| format!("{series} has no end"))?;
            ensure!(self.0.get(&count) == Some(&last.1), "{count} is {:?}, the last bucket {}", self.0.get(&count), last.1);
        }
        Ok(())
    }

    /// The value of a series, written as in the text; 0 when it is not there.
    pub fn value(&self, series: &str) -> f64 {
        self.0.get(series).copied().unwrap_or(0.0)
    }

    pub fn has(&self, series: &str) -> bool {
        self.0.contains_key(series)
    }
}

fn is_name(name: &str) -> bool {
    let part = |character: char| character.is_ascii_alphanumeric() || character == '_';
    name.chars().all(part) && name.chars().next().is_some_and(|first| !first.is_ascii_digit())
}

fn check_labels(labels: &str) -> Result<()> {
    let labels = labels.strip_suffix('}').context("no closing bracket")?;
    let mut seen = BTreeSet::new();
    for label in labels.split(',') {
        let (key, value) = label.split_once('=').context("no value")?;
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).context("no quotes")?;
        if !is_name(key) || value.contains(['"', '\\', '\n']) || value.is_empty() || !seen.insert(key) {
            bail!("label {label:?}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_format_does_not_allow_is_found() {
        let good = "# HELP a_total Some.\n# TYPE a_total counter\na_total{x=\"y\"} 1\n";
        assert_eq!(Scrape::parse(good).expect("good").value("a_total{x=\"y\"}"), 1.0);
        for (from, to) in [
            ("a_total{x=\"y\"} 1\n", "a_total{x=\"y\"} 1"),
            ("# TYPE a_total counter\n", ""),
            ("# HELP a_total Some.\n", ""),
            ("{x=\"y\"}", "{x=y}"),
            ("{x=\"y\"}", "{x=\"y\""),
            (" 1\n", " one\n"),
            (" 1\n", " 1\na_total{x=\"y\"} 2\n"),
            ("a_total{", "b_total{"),
            ("counter", "gauge"),
        ] {
            assert!(Scrape::parse(&good.replacen(from, to, 1)).is_err(), "{from:?} as {to:?}");
        }
        let histogram = |one: u32, all: u32, count: u32| {
            let lines = format!("h_bucket{{le=\"1\"}} {one}\nh_bucket{{le=\"+Inf\"}} {all}\nh_sum 3\nh_count {count}\n");
            Scrape::parse(&format!("# HELP h Some.\n# TYPE h histogram\n{lines}"))
        };
        assert!(histogram(1, 2, 2).is_ok() && histogram(3, 2, 2).is_err() && histogram(1, 2, 3).is_err());
    }
}
