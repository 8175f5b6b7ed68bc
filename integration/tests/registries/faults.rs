//! One table of everything that goes wrong between a node and a registry: how the pull ends, how many bytes that took, and that it leaves
//! nothing. The registry is distribution with a token service; the faults are a proxy's.

use crate::{
    Ground, directories, login,
    proxy::{Fault, Proxy, Seen},
    servers::{Image, Server, Ways, digest},
    tokens::{Tokens, USER},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::time::{Duration, Instant};
use tonic::Code;
use windlass_integration::{image, node};

/// Of the layer that the faults concern: large enough for what came of it to be kept for the next pull.
const LAYER_BYTES: usize = 10 << 20;
const MIB: usize = 1 << 20;

/// How a pull ends.
enum End {
    /// With the image, after this many requests for the layer.
    Pulled(usize),
    /// With this code and these words.
    Fails(Code, &'static str),
}

struct Case {
    name: &'static str,
    faults: Vec<Fault>,
    /// The last fault goes on for all requests that follow.
    lasting: bool,
    end: End,
    /// Bytes of the layer that are sent, as far as they can be told.
    sent: Option<usize>,
    /// What the next pull finds here already, at least.
    kept: usize,
}

fn case(name: &'static str, faults: &[Fault], end: End) -> Case {
    Case { name, faults: faults.to_vec(), lasting: false, end, sent: None, kept: 0 }
}

fn lasting(name: &'static str, fault: Fault, end: End) -> Case {
    Case { lasting: true, ..case(name, &[fault], end) }
}

/// Everything is up but the layer: `size` is its length, `storage` a host that needs no token, `expired` a token that did once.
fn cases(size: usize, storage: &str, expired: &str) -> Vec<Case> {
    use End::*;
    use Fault::*;
    let unavailable = |words| Fails(Code::Unknown, words);
    let short = -100;
    let whole = |case: Case| Case { sent: Some(size), ..case };
    vec![
        whole(case("no fault", &[None], Pulled(1))),
        whole(case("cut twice", &[Cut(3 * MIB), Cut(2 * MIB + 7)], Pulled(3))),
        whole(case("cut before the first byte", &[Cut(0), Cut(0), Cut(0)], Pulled(4))),
        Case { kept: 2 * MIB, ..case("cut until the client gives up", &cut_forever(), unavailable("blob sha256:")) },
        case("stalled", &[Stall(4 * MIB)], Pulled(2)),
        whole(case("slow, but not for longer than the time-out", &[Drip(8, Duration::from_millis(250))], Pulled(1))),
        case("one bit is another", &[Flip(5 * MIB)], Fails(Code::DataLoss, "sha256:")),
        case("one bit is another, then cut", &[Flip(100), Cut(0)], Fails(Code::DataLoss, "sha256:")),
        case("more comes than the manifest says", &[More(64 << 10)], Fails(Code::DataLoss, "longer than")),
        whole(case("a length that is too long", &[Length(1 << 20)], Pulled(1))),
        whole(case("a length that is too short", &[Length(short)], Pulled(2))),
        Case { kept: 9 * MIB, ..lasting("always too short", Length(short), unavailable("bytes")) },
        case("a token that ends in the middle", &[Cut(3 * MIB), Token(expired.into())], Pulled(3)),
        Case { kept: 2 * MIB, ..tokens_end(expired) },
        case("sent to another host", &[Redirect(storage.into())], Pulled(1)),
        case("cut, then sent to another host", &[Cut(3 * MIB), Redirect(storage.into())], Pulled(2)),
        whole(case("asked to wait", &[Status("429 Too Many Requests", "Retry-After: 1\r\n")], Pulled(2))),
        lasting("asked to wait for ever", Status("429 Too Many Requests", "Retry-After: 0\r\n"), unavailable("429")),
        whole(case("unavailable three times", &[unwell(), unwell(), unwell()], Pulled(4))),
        lasting("unavailable", unwell(), unavailable("503")),
        case("a registry that knows no ranges", &[Cut(3 * MIB), NoRange], Pulled(2)),
        Case { kept: 2 * MIB, ..case("another range", &[Cut(3 * MIB), Shift], unavailable("asked for bytes from")) },
        case("gone", &[Status("404 Not Found", "")], Fails(Code::NotFound, "sha256:")),
        case("forbidden", &[Status("403 Forbidden", "")], Fails(Code::PermissionDenied, "403")),
    ]
}

fn unwell() -> Fault {
    Fault::Status("503 Service Unavailable", "")
}

/// Some bytes, then none, five times in a row.
fn cut_forever() -> Vec<Fault> {
    [Fault::Cut(3 * MIB)].into_iter().chain(vec![Fault::Cut(0); 5]).collect()
}

fn tokens_end(expired: &str) -> Case {
    let faults = [Fault::Cut(3 * MIB), Fault::Token(expired.into())];
    Case { lasting: true, ..case("every token has ended", &faults, End::Fails(Code::PermissionDenied, "401")) }
}

struct Bench {
    ground: Ground,
    proxy: Proxy,
    /// A second way to the same blobs, without tokens.
    elsewhere: Proxy,
    image: Image,
    /// The layer that the faults concern.
    blob: String,
}

impl Bench {
    fn name(&self) -> String {
        format!("{}/team/big:v1", self.proxy.address)
    }

    fn pull(&self) -> Result<String, tonic::Status> {
        self.ground.pull(&self.name(), login(USER.0, USER.1))
    }

    fn requests(&self) -> Vec<Seen> {
        self.proxy.seen(&self.blob)
    }

    fn check(&self, case: &Case) -> Result<()> {
        self.proxy.set(std::slice::from_ref(&self.blob), &case.faults, case.lasting);
        self.elsewhere.set(&[], &[], false);
        let began = Instant::now();
        let pulled = self.pull();
        let (requests, took) = (self.requests(), began.elapsed());
        let sent: u64 = requests.iter().chain(&self.elsewhere.seen(&self.blob)).map(|seen| seen.sent).sum();
        println!("{:45} {:6.2} s {sent:9} bytes in {} requests", case.name, took.as_secs_f64(), requests.len());
        match (&case.end, &pulled) {
            (End::Pulled(times), Ok(id)) => {
                ensure!(*id == self.image.id() && requests.len() == *times, "{id}: {requests:#?}");
                ensure!(case.sent.is_none_or(|expected| expected as u64 == sent), "{sent} bytes: {requests:#?}");
            }
            (End::Fails(code, words), Err(status)) => {
                ensure!(status.code() == *code && status.message().contains(words), "{status:?}");
                ensure!(*code != Code::Unknown || status.message().starts_with("RegistryUnavailable: "), "{status:?}");
                ensure!(self.ground.images()?.is_empty(), "listed after {status}");
            }
            other => anyhow::bail!("{:?}: {requests:#?}", other.1),
        }
        self.waits(case, &requests, took)?;
        self.ground.expect_finished()?;
        // No name that the proxy gave to another host came with what the registry alone may know.
        let strangers = self.elsewhere.seen("");
        ensure!(strangers.iter().all(|seen| seen.authorization.is_empty()), "{strangers:#?}");
        ensure!(strangers.is_empty() != case.faults.iter().any(|fault| matches!(fault, Fault::Redirect(_))), "{strangers:#?}");
        self.afterwards(case, pulled.is_ok())
    }

    /// What a case says besides how it ends.
    fn waits(&self, case: &Case, requests: &[Seen], took: Duration) -> Result<()> {
        if case.name == "asked to wait" {
            ensure!(took >= Duration::from_secs(1), "did not wait: {took:?}");
        }
        if case.name == "stalled" {
            ensure!(took >= Duration::from_secs(1) && took < Duration::from_secs(60), "{took:?}");
        }
        let resumed: Vec<&Seen> = requests.iter().filter(|seen| !seen.range.is_empty()).collect();
        if let (Some(Fault::Cut(at)), Some(first)) =
            (case.faults.first().filter(|fault| **fault != Fault::Cut(0)), resumed.first())
        {
            ensure!(first.range == format!("bytes={at}-"), "{requests:#?}");
        }
        Ok(())
    }

    /// Without the fault the image comes, whole, and of a large layer that was under way only the rest.
    fn afterwards(&self, case: &Case, pulled: bool) -> Result<()> {
        if !pulled {
            self.ground.expect_sound(0)?;
            let kept_bytes = self.ground.kept_bytes();
            ensure!(kept_bytes >= case.kept as u64 && (case.kept > 0 || kept_bytes == 0), "{kept_bytes} bytes are kept");
            self.proxy.set(&[], &[], false);
            ensure!(self.pull()? == self.image.id());
            let sent: u64 = self.requests().iter().map(|seen| seen.sent).sum();
            ensure!(sent + kept_bytes == self.blob_bytes()?, "{sent} bytes, {kept_bytes} were there");
        }
        self.ground.expect_sound(self.image.layers.len())?;
        ensure!(self.ground.kept_bytes() == 0, "{} bytes are kept of what is done", self.ground.kept_bytes());
        self.ground.remove(&self.name())?;
        ensure!(self.ground.images()?.is_empty());
        self.ground.expect_finished()
    }

    fn blob_bytes(&self) -> Result<u64> {
        Ok(self.image.layers.last().context("a layer")?.len() as u64)
    }
}

#[test]
fn whatever_goes_wrong_on_the_way_ends_well_or_leaves_nothing() -> Result<()> {
    node::run(|| {
        let (directory, storage) = directories()?;
        let tokens = Tokens::start(directory.path(), None)?;
        let layers = [
            image::files_layer(&[("base", 0o644, &image::noise(1, 100_000))])?,
            image::files_layer(&[("big", 0o644, &image::noise(2, LAYER_BYTES))])?,
        ];
        let image = Image::new(&layers, json!({}))?;
        let open = Server::distribution(directory.path(), &storage, Ways::default())?;
        open.push("team/big", "v1", &image)?;
        let registry = Server::distribution(directory.path(), &storage, Ways { tokens: Some(&tokens), ..Ways::default() })?;
        let blob = digest(image.layers.last().context("a layer")?);
        let (proxy, elsewhere) = (Proxy::start(&registry.address)?, Proxy::start(&open.address)?);
        let ground = Ground::new("progress_timeout_seconds = 3\n")?;
        let bench = Bench { ground, proxy, elsewhere, image, blob };
        let size = usize::try_from(bench.blob_bytes()?)?;
        let expired = tokens.token("team/big", &["pull"], -3600)?;
        for case in cases(size, &bench.elsewhere.address, &expired) {
            bench.check(&case).with_context(|| case.name)?;
        }
        Ok(())
    })
}
