//! A daemon that is killed in the middle of pulls: whatever is listed afterwards is whole, and nothing unfinished stays.

use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use windlass_integration::{client::Client, daemon::Daemon, image, node, registry::Registry};
use windlass_proto::cri;

/// For each form of layers.
const KILLS: u64 = 50;

#[test]
fn fifty_kills_in_the_middle_of_pulls() -> Result<()> {
    node::run(|| {
        let registry = Registry::start()?;
        // Bytes that do not compress, differently in each layer: a pull takes some tens of milliseconds.
        let layers: Vec<Vec<u8>> = (0..6)
            .map(|seed| image::files_layer(&[(&format!("file{seed}"), 0o644, &image::noise(seed, 1 << 20))]))
            .collect::<Result<_>>()?;
        let config = serde_json::json!({ "architecture": image::ARCHITECTURE, "os": "linux" });
        registry.add("test/killed", "v1", &layers, &config)?;
        let name = format!("{}/test/killed:v1", registry.host());
        for form in ["erofs", "directory"] {
            kills(&name, form).with_context(|| format!("layers as {form}"))?;
        }
        Ok(())
    })
}

fn kills(name: &str, form: &str) -> Result<()> {
    let mut daemon = Daemon::prepare(&[])?;
    daemon.configure(&format!("[images]\nlayers = {form:?}\n"))?;
    daemon.serve()?;
    let spec = || Some(cri::ImageSpec { image: name.to_owned(), ..Default::default() });
    let pull = |client: &Client| client.pull_image(cri::PullImageRequest { image: spec(), ..Default::default() });
    // The quickest of some: the disk is slow now and then.
    let mut takes = Duration::MAX;
    for _ in 0..5 {
        let client = Client::connect(&daemon)?;
        client.remove_image(cri::RemoveImageRequest { image: spec() })?;
        let began = Instant::now();
        pull(&client)?;
        takes = takes.min(began.elapsed());
    }
    let (mut whole, mut cut) = (0, 0);
    for kill in 0..KILLS {
        let client = Client::connect(&daemon)?;
        client.remove_image(cri::RemoveImageRequest { image: spec() })?;
        std::thread::scope(|scope| -> Result<()> {
            let pulling = scope.spawn(|| pull(&client).is_ok());
            // Spread over the whole pull and a little beyond.
            std::thread::sleep(takes.mul_f64(1.2 * kill as f64 / KILLS as f64));
            daemon.kill9()?;
            let finished = pulling.join().is_ok_and(|finished| finished);
            (whole, cut) = if finished { (whole + 1, cut) } else { (whole, cut + 1) };
            Ok(())
        })?;
        daemon.serve()?;
        let listed = Client::connect(&daemon)?.list_images(cri::ListImagesRequest::default())?.images;
        ensure!(listed.len() <= 1, "{listed:?}");
        let checked = daemon.windlass(&["image", "verify"]).with_context(|| format!("after kill {kill}"))?;
        ensure!(checked.lines().all(|line| line.ends_with("sound")), "after kill {kill}: {checked}");
        let until = Instant::now() + Duration::from_secs(60);
        while !daemon.unfinished_layers()?.is_empty() {
            ensure!(Instant::now() < until, "kill {kill} left {:?}", daemon.unfinished_layers()?);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    ensure!(cut >= KILLS / 4, "only {cut} kills met a pull, {whole} came after it");
    pull(&Client::connect(&daemon)?)?;
    let checked = daemon.windlass(&["image", "verify"])?;
    ensure!(checked.lines().count() == 6 && checked.lines().all(|line| line.ends_with("sound")), "{checked}");
    Ok(())
}
