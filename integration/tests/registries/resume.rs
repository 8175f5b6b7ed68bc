//! A daemon that is killed in the midst of a large layer: the next one asks for the rest.

use crate::{
    Ground, directories, eventually, login,
    proxy::{Fault, Proxy},
    servers::{Image, Server, Ways, digest},
    tokens::{Tokens, USER},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use windlass_integration::{client::Client, image, node};

const LAYER_BYTES: usize = 24 << 20;
/// What comes before each kill.
const PART: usize = 7 << 20;
/// What may be under way when the daemon dies: the piece that is written at once.
const LOST: u64 = 2 << 20;

#[test]
fn a_layer_goes_on_where_a_killed_daemon_left_it() -> Result<()> {
    node::run(|| {
        let (directory, storage) = directories()?;
        let tokens = Tokens::start(directory.path(), None)?;
        let image = Image::new(&[image::files_layer(&[("big", 0o644, &image::noise(5, LAYER_BYTES))])?], json!({}))?;
        Server::distribution(directory.path(), &storage, Ways::default())?.push("team/big", "v1", &image)?;
        let registry = Server::distribution(directory.path(), &storage, Ways { tokens: Some(&tokens), ..Ways::default() })?;
        let proxy = Proxy::start(&registry.address)?;
        let (blob, name) = (digest(&image.layers[0]), format!("{}/team/big:v1", proxy.address));
        let size = image.layers[0].len() as u64;
        let mut ground = Ground::new("")?;
        let mut kept = 0;
        for kill in 0..3 {
            proxy.set(std::slice::from_ref(&blob), &[Fault::Stall(PART)], false);
            let Ground { daemon, client } = &mut ground;
            let partial = daemon.root().join("images/partial").join(&blob["sha256:".len()..]);
            let kept_bytes = || std::fs::metadata(&partial).map_or(0, |metadata| metadata.len());
            std::thread::scope(|scope| -> Result<()> {
                let request = windlass_proto::cri::PullImageRequest {
                    image: crate::spec(&name),
                    auth: login(USER.0, USER.1),
                    sandbox_config: None,
                };
                let pulling = scope.spawn(|| client.pull_image(request));
                let come = eventually("most of a part is here", || {
                    let now = kept_bytes();
                    ensure!(now + LOST >= kept + PART as u64, "{now} bytes after {kept}");
                    Ok(())
                });
                daemon.kill9()?;
                ensure!(pulling.join().is_ok_and(|pulled| pulled.is_err()), "the pull outlived its daemon");
                come
            })?;
            let range = proxy.seen(&blob).first().context("a request")?.range.clone();
            ensure!(range == if kept == 0 { String::new() } else { format!("bytes={kept}-") }, "kill {kill}: {range}");
            kept = kept_bytes();
            daemon.serve()?;
            *client = Client::connect(daemon)?;
            ensure!(ground.images()?.is_empty(), "kill {kill}: {:?}", ground.images()?);
            ground.expect_sound(0)?;
            ground.expect_finished()?;
        }
        proxy.set(std::slice::from_ref(&blob), &[], false);
        ensure!(ground.pull(&name, login(USER.0, USER.1))? == image.id());
        let last = proxy.seen(&blob);
        let sent: u64 = last.iter().map(|seen| seen.sent).sum();
        ensure!(
            last.len() == 1 && sent == size - kept && last[0].range == format!("bytes={kept}-"),
            "{sent} of {size}: {last:?}"
        );
        ensure!(sent < size - 2 * PART as u64, "{sent} bytes of {size} came again");
        ground.expect_sound(1)?;
        ensure!(ground.kept_bytes() == 0);
        Ok(())
    })
}
