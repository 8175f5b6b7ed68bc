//! What `windlass image` prints.

use super::super::output::{Format, json, line, pretty, short, size, table};
use super::Look;
use crate::error::{Error, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use windlass_proto::image as api;
use windlass_proto::image::layer_progress::State;
use windlass_proto::image::verify_event::Verdict;

/// What the image is called: its tags, else its digests, else nothing.
fn names(image: &api::Image) -> Vec<&str> {
    let names = if image.tags.is_empty() { &image.digests } else { &image.tags };
    names.iter().map(String::as_str).collect()
}

pub(super) fn list(list: &api::ListReply, no_trunc: bool, look: Look) -> Result<()> {
    if look.format == Format::Json {
        return json(&list.images);
    }
    if look.quiet {
        return list.images.iter().try_for_each(|image| line(&image.id));
    }
    let mut rows = vec![["NAME".to_owned(), "ID".to_owned(), "SIZE".to_owned(), "CONTAINERS".to_owned()]];
    for image in &list.images {
        let mut names = names(image);
        if names.is_empty() {
            names.push("<none>");
        }
        for name in names {
            let id = if no_trunc { &image.id } else { short(&image.id) };
            rows.push([name.to_owned(), id.to_owned(), size(image.size_bytes), image.containers.len().to_string()]);
        }
    }
    table(&rows)
}

pub(super) fn inspect(image: &api::Image) -> Result<()> {
    let failed = |error: serde_json::Error| Error::internal(format!("encode the result: {error}"));
    let mut value = serde_json::to_value(image).map_err(failed)?;
    if let Some(map) = value.as_object_mut() {
        map.remove("config_json");
        map.insert("config".into(), serde_json::from_str(&image.config_json).map_err(failed)?);
    }
    pretty(&value)
}

pub(super) fn imported(images: &[api::Image], look: Look) -> Result<()> {
    if look.format == Format::Json {
        return json(&images);
    }
    images.iter().try_for_each(|image| {
        if look.quiet { line(&image.id) } else { line(format_args!("{} {}", image.id, image.tags.join(" "))) }
    })
}

pub(super) fn pulled(name: &str, image: &api::Image, look: Look) -> Result<()> {
    match (look.format, look.quiet) {
        (Format::Json, _) => json(image),
        (Format::Text, true) => line(&image.id),
        (Format::Text, false) => line(format_args!("{name}: {} ({})", image.id, size(image.size_bytes))),
    }
}

pub(super) fn removed(images: &[api::Image], look: Look) -> Result<()> {
    if look.format == Format::Json {
        return json(&images);
    }
    for image in images {
        if look.quiet {
            line(&image.id)?;
            continue;
        }
        let used = match image.containers.len() {
            0 => String::new(),
            count => format!(" (its layers stay until its {count} containers are removed)"),
        };
        line(format_args!("{} {}{used}", image.id, names(image).join(" ")))?;
    }
    Ok(())
}

pub(super) fn given_back(images: usize, bytes: u64, dry_run: bool, look: Look) {
    if look.format == Format::Text && !look.quiet {
        let what = if dry_run { "would be removed".to_owned() } else { format!("removed, {} given back", size(bytes)) };
        let _ = writeln!(std::io::stderr(), "{images} images {what}");
    }
}

pub(super) fn verified(event: &api::VerifyEvent, look: Look) -> Result<()> {
    if look.format == Format::Json {
        return json(event);
    }
    if !event.given_up.is_empty() {
        return event.given_up.iter().try_for_each(|name| line(format_args!("given up: {name}")));
    }
    let (image, layer) = (short(&event.image), short(&event.chain_id));
    match event.verdict() {
        Verdict::Sound if look.quiet => Ok(()),
        Verdict::Sound => line(format_args!("{image} {layer} sound")),
        Verdict::Unknown => line(format_args!("{image} {layer} not checked: {}", event.why)),
        Verdict::Damaged => line(format_args!("{image} {layer} DAMAGED: {}", event.why)),
    }
}

/// What each image takes, and what of that is its alone.
pub(super) fn usage(list: &api::ListReply, look: Look) -> Result<()> {
    #[derive(Serialize)]
    struct Row<'a> {
        id: &'a str,
        names: Vec<&'a str>,
        size_bytes: u64,
        own_bytes: u64,
        containers: usize,
    }
    let own = |image: &api::Image| image.layers.iter().filter(|layer| layer.images == 1).map(|layer| layer.bytes).sum();
    let rows: Vec<Row<'_>> = list
        .images
        .iter()
        .map(|image| Row {
            id: &image.id,
            names: names(image),
            size_bytes: image.size_bytes,
            own_bytes: own(image),
            containers: image.containers.len(),
        })
        .collect();
    let layers: HashMap<&str, u64> =
        list.images.iter().flat_map(|image| &image.layers).map(|layer| (layer.chain_id.as_str(), layer.bytes)).collect();
    let imaged: u64 = layers.values().sum();
    let others = list.used_bytes.saturating_sub(imaged).saturating_sub(list.partial_bytes);
    if look.format == Format::Json {
        let whole = serde_json::json!({
            "images": rows, "directory": list.directory, "used_bytes": list.used_bytes, "of_no_image_bytes": others,
            "of_unfinished_pulls_bytes": list.partial_bytes,
        });
        return json(&whole);
    }
    let mut table_rows = vec![["NAME", "ID", "SIZE", "OWN", "CONTAINERS"].map(str::to_owned)];
    for row in &rows {
        let name = row.names.first().copied().unwrap_or("<none>").to_owned();
        table_rows.push([name, short(row.id).to_owned(), size(row.size_bytes), size(row.own_bytes), row.containers.to_string()]);
    }
    table(&table_rows)?;
    line(format_args!(
        "{} in {}; {} of it only for containers whose image was removed, {} of pulls that did not end",
        size(list.used_bytes),
        list.directory,
        size(others),
        size(list.partial_bytes)
    ))
}

/// A bar for each layer on a terminal; elsewhere a line for each that is done.
pub(super) struct Bars {
    name: String,
    look: Look,
    drawn: Option<MultiProgress>,
    bars: HashMap<String, ProgressBar>,
    done: HashMap<String, State>,
}

impl Bars {
    pub(super) fn new(name: &str, look: Look) -> Bars {
        let shown = !look.quiet && look.format == Format::Text;
        let terminal = shown && std::io::stderr().is_terminal();
        let drawn = terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Bars { name: name.to_owned(), look, drawn, bars: HashMap::new(), done: HashMap::new() }
    }

    pub(super) fn show(&mut self, layers: &[api::LayerProgress]) {
        if self.look.quiet || self.look.format == Format::Json {
            return;
        }
        for layer in layers {
            let finished = matches!(layer.state(), State::Done | State::Exists);
            match &self.drawn {
                Some(drawn) => {
                    let bar = self.bars.entry(layer.digest.clone()).or_insert_with(|| drawn.add(bar(layer)));
                    bar.set_position(layer.fetched_bytes);
                    bar.set_message(said(layer.state()));
                    if finished && !bar.is_finished() {
                        bar.set_position(layer.size_bytes);
                        bar.finish();
                    }
                }
                None if finished && self.done.insert(layer.digest.clone(), layer.state()).is_none() => {
                    let (digest, bytes) = (short(&layer.digest), size(layer.size_bytes));
                    let _ = writeln!(std::io::stderr(), "{}: {digest} {} ({bytes})", self.name, said(layer.state()));
                }
                None => {}
            }
        }
    }

    /// Leaves what was drawn as it is.
    pub(super) fn end(&mut self) {
        self.bars.values().filter(|bar| !bar.is_finished()).for_each(ProgressBar::abandon);
    }
}

fn bar(layer: &api::LayerProgress) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{bar:30}] {bytes:>10}/{total_bytes:<10} {msg}");
    let bar = ProgressBar::new(layer.size_bytes).with_prefix(short(&layer.digest).to_owned());
    match style {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

fn said(state: State) -> &'static str {
    match state {
        State::Waiting => "waiting",
        State::Fetching => "fetching",
        State::Done => "done",
        State::Exists => "exists",
    }
}
