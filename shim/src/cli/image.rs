//! `windlass image`: asks the daemon where one serves, else does the same work itself on the store.

mod output;

use super::output::Format;
use super::serve::{lock, open_store};
use crate::config::Config;
use crate::container;
use crate::cri::images::Images;
use crate::error::{Error, Kind, Result};
use crate::image::Lease;
use crate::store;
use clap::{Args, Subcommand};
use futures_util::{StreamExt, stream::BoxStream};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use windlass_proto::image as api;
use windlass_proto::image::images_client::ImagesClient;
use windlass_proto::image::images_server::Images as _;

/// Largest message of the daemon: a list of all images with their configurations.
const MESSAGE_LIMIT_BYTES: usize = 64 << 20;

/// `windlass image ...`
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Pull images from their registries.
    Pull {
        /// Names, as in a pod: busybox, registry.example/team/app:1.0, name@sha256:...
        #[arg(required = true)]
        names: Vec<String>,
        /// Log in as USER with the password that standard input gives
        #[arg(long, value_name = "USER")]
        user: Option<String>,
        #[command(flatten)]
        look: Look,
    },
    /// List images.
    Ls {
        /// Only this image
        name: Option<String>,
        /// Whole ids
        #[arg(long)]
        no_trunc: bool,
        #[command(flatten)]
        look: Look,
    },
    /// Remove images, with all their names. Containers that were made from one go on running.
    Rm {
        /// Names or ids
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        look: Look,
    },
    /// Give an image one more name. An image that had it loses it.
    Tag {
        /// Name or id
        name: String,
        /// The new name
        tag: String,
        #[command(flatten)]
        look: Look,
    },
    /// Show all that is known of an image, as JSON.
    Inspect {
        /// Name or id
        name: String,
    },
    /// Import an OCI layout (directory or tar) or an archive of `docker save`.
    Import {
        /// The archive or directory.
        file: PathBuf,
        #[command(flatten)]
        look: Look,
    },
    /// Write an image as an OCI layout in a tar, which `docker load` and `ctr image import` take too.
    Export {
        /// Name or id
        name: String,
        /// The file to write; `-` for standard output
        #[arg(short, long, default_value = "-")]
        output: PathBuf,
    },
    /// Remove all images that no container was made from, but those that `images.pinned` of the configuration names, and what is kept of
    /// layers whose pull did not end.
    Prune {
        /// Only say which
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        look: Look,
    },
    /// Check that every layer is byte by byte what was pulled. Exits with 1 if one is not.
    Verify {
        /// Names or ids [default: all images]
        names: Vec<String>,
        /// Give damaged layers up, with the images that have them; pull those again afterwards
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        look: Look,
    },
    /// Show what images take on disk: in all, and what would come back if one were removed.
    Du {
        #[command(flatten)]
        look: Look,
    },
}

/// How results are shown.
#[derive(Debug, Clone, Copy, Args)]
pub struct Look {
    /// How to print results
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Print nothing but names or ids
    #[arg(short, long)]
    quiet: bool,
}

/// Where the work is done.
enum Backend {
    Daemon(ImagesClient<Channel>),
    /// With the lock on the store.
    Own(Images, #[expect(dead_code, reason = "held")] std::fs::File),
}

type Events<T> = BoxStream<'static, std::result::Result<T, Status>>;

fn told(status: Status) -> Error {
    let kind = match status.code() {
        Code::NotFound => Kind::NotFound,
        Code::InvalidArgument => Kind::Invalid,
        Code::Unimplemented => Kind::Unimplemented,
        _ => Kind::Internal,
    };
    Error::new(kind, status.message())
}

/// Calls the same method of the one or the other.
macro_rules! ask {
    ($backend:expr, $method:ident, $request:expr) => {
        match $backend {
            Backend::Daemon(client) => client.$method($request).await.map(tonic::Response::into_inner),
            Backend::Own(images, ..) => images.$method(Request::new($request)).await.map(tonic::Response::into_inner),
        }
        .map_err(told)
    };
}

/// The same for what answers with a stream.
macro_rules! watch {
    ($backend:expr, $method:ident, $request:expr) => {
        match $backend {
            Backend::Daemon(client) => client.$method($request).await.map(|answer| answer.into_inner().boxed()),
            Backend::Own(images, ..) => images.$method(Request::new($request)).await.map(|answer| answer.into_inner().boxed()),
        }
        .map_err(told)
    };
}

impl Backend {
    /// The root decides: its own store if nobody holds it, else the daemon, which must be that of this root.
    async fn find(config: &Config) -> Result<Backend> {
        let in_use = match lock(config) {
            Ok(lock) => return Backend::own(config, lock),
            Err(error) if error.kind == Kind::Precondition => error,
            Err(error) => return Err(error),
        };
        let socket = config.socket.display();
        let unanswered = |why: String| in_use.clone().during(format_args!("no daemon answers at {socket} ({why}), and"));
        let endpoint = Endpoint::try_from(format!("unix:{socket}")).map_err(|error| unanswered(error.to_string()))?;
        let channel = endpoint.connect().await.map_err(|error| unanswered(error.to_string()))?;
        let client = ImagesClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT_BYTES);
        let mut backend = Backend::Daemon(client);
        let served = backend.list("").await?.directory;
        if !Path::new(&served).starts_with(&config.root) {
            return Err(Error::precondition(format!(
                "the daemon at {socket} has its images in {served}, not in {}; name its socket by --socket or --state",
                config.root.display()
            )));
        }
        Ok(backend)
    }

    fn own(config: &Config, lock: std::fs::File) -> Result<Backend> {
        let store = open_store(config)?;
        // Containers live on while no daemon serves, and their layers with them: these are held until the process ends.
        let records = records(&config.root.join("containers"))?;
        Vec::leak(records.iter().map(|record| store.lease_layers(&record.chain_ids)).collect::<Vec<Lease>>());
        let users: Vec<_> = records.into_iter().map(|record| (record.id, record.image_id)).collect();
        Ok(Backend::Own(Images::new(store, Arc::new(move || users.clone())), lock))
    }

    async fn list(&mut self, name: &str) -> Result<api::ListReply> {
        ask!(self, list, api::ListRequest { name: name.to_owned() })
    }

    async fn remove(&mut self, name: &str) -> Result<Option<api::Image>> {
        Ok(ask!(self, remove, api::RemoveRequest { name: name.to_owned() })?.image)
    }
}

fn records(directory: &Path) -> Result<Vec<container::Record>> {
    let path = |id: &String| directory.join(id).join("record.json");
    store::entries(directory)?.iter().filter_map(|id| store::read(&path(id)).transpose()).collect()
}

/// Runs a command to its end.
pub(super) async fn run(config: Config, command: ImageCommand) -> Result<()> {
    let mut backend = Backend::find(&config).await?;
    match command {
        ImageCommand::Pull { names, user, look } => pull(&mut backend, &names, user, look).await,
        ImageCommand::Ls { name, no_trunc, look } => {
            let list = backend.list(name.as_deref().unwrap_or_default()).await?;
            if let (Some(name), true) = (&name, list.images.is_empty()) {
                return Err(missing(name));
            }
            output::list(&list, no_trunc, look)
        }
        ImageCommand::Rm { names, look } => {
            for name in names {
                let removed = backend.remove(&name).await?.ok_or_else(|| missing(&name))?;
                output::removed(&[removed], look)?;
            }
            Ok(())
        }
        ImageCommand::Tag { name, tag, look } => {
            let reply = ask!(&mut backend, tag, api::TagRequest { name, tag })?;
            output::imported(&Vec::from_iter(reply.image), look)
        }
        ImageCommand::Inspect { name } => {
            let list = backend.list(&name).await?;
            output::inspect(list.images.first().ok_or_else(|| missing(&name))?)
        }
        ImageCommand::Import { file, look } => {
            let path = file.canonicalize().map_err(|error| Error::io(format_args!("import {}", file.display()), error))?;
            let request = api::ImportRequest { path: path.to_string_lossy().into_owned() };
            output::imported(&ask!(&mut backend, import, request)?.images, look)
        }
        ImageCommand::Export { name, output } => export(&mut backend, name, &output).await,
        ImageCommand::Prune { dry_run, look } => prune(&mut backend, dry_run, look).await,
        ImageCommand::Verify { names, repair, look } => verify(&mut backend, names, repair, look).await,
        ImageCommand::Du { look } => output::usage(&backend.list("").await?, look),
    }
}

fn missing(name: &str) -> Error {
    Error::not_found(format!("image {name:?} is not on this node; `windlass image ls` shows what is"))
}

async fn pull(backend: &mut Backend, names: &[String], user: Option<String>, look: Look) -> Result<()> {
    let mut password = String::new();
    if user.is_some() {
        let read = std::io::stdin().take(64 << 10).read_to_string(&mut password);
        read.map_err(|error| Error::io("read the password from standard input", error))?;
    }
    let password = password.trim_end_matches(['\r', '\n']);
    for name in names {
        let username = user.clone().unwrap_or_default();
        let request = api::PullRequest { name: name.clone(), username, password: password.to_owned() };
        let mut events: Events<api::PullEvent> = watch!(&mut *backend, pull, request)?;
        let mut bars = output::Bars::new(name, look);
        let mut pulled = None;
        while let Some(event) = events.next().await {
            let event = event.map_err(|status| {
                bars.end();
                told(status)
            })?;
            bars.show(&event.layers);
            pulled = pulled.or(event.image);
        }
        bars.end();
        let image = pulled.ok_or_else(|| Error::internal(format!("pull {name}: the daemon went away")))?;
        output::pulled(name, &image, look)?;
    }
    Ok(())
}

async fn export(backend: &mut Backend, name: String, path: &Path) -> Result<()> {
    let failed = |error| Error::io(format_args!("write {}", path.display()), error);
    let to_terminal = path == Path::new("-") && std::io::IsTerminal::is_terminal(&std::io::stdout());
    if to_terminal {
        return Err(Error::invalid("an image is not for a terminal: name a file with --output, or redirect"));
    }
    let mut chunks: Events<api::ExportChunk> = watch!(backend, export, api::ExportRequest { name })?;
    let mut first = match chunks.next().await {
        Some(chunk) => chunk.map_err(told)?.data,
        None => Vec::new(),
    };
    // Only now: what cannot be exported leaves no empty file.
    let mut to: Box<dyn Write> = if path == Path::new("-") {
        Box::new(std::io::stdout().lock())
    } else {
        Box::new(std::fs::File::create(path).map_err(failed)?)
    };
    loop {
        to.write_all(&first).map_err(failed)?;
        first = match chunks.next().await {
            Some(Ok(chunk)) => chunk.data,
            Some(Err(status)) => {
                if path != Path::new("-") {
                    let _ = std::fs::remove_file(path);
                }
                return Err(told(status));
            }
            None => return to.flush().map_err(failed),
        };
    }
}

async fn prune(backend: &mut Backend, dry_run: bool, look: Look) -> Result<()> {
    let before = backend.list("").await?;
    let unused: Vec<api::Image> =
        before.images.into_iter().filter(|image| image.containers.is_empty() && !image.pinned).collect();
    let mut removed = Vec::new();
    for image in unused {
        if dry_run {
            removed.push(image);
        } else {
            removed.extend(backend.remove(&image.id).await?);
        }
    }
    if !dry_run {
        match ask!(&mut *backend, clear, api::ClearRequest {}) {
            // A daemon of an earlier version keeps them for its hour.
            Err(error) if error.kind == Kind::Unimplemented => {}
            cleared => drop(cleared?),
        }
    }
    output::removed(&removed, look)?;
    let back = before.used_bytes.saturating_sub(backend.list("").await?.used_bytes);
    output::given_back(removed.len(), back, dry_run, look);
    Ok(())
}

async fn verify(backend: &mut Backend, names: Vec<String>, repair: bool, look: Look) -> Result<()> {
    let names = if names.is_empty() { vec![String::new()] } else { names };
    let mut damaged = 0;
    for name in names {
        let mut events: Events<api::VerifyEvent> = watch!(&mut *backend, verify, api::VerifyRequest { name, repair })?;
        while let Some(event) = events.next().await {
            let event = event.map_err(told)?;
            damaged += usize::from(event.verdict() == api::verify_event::Verdict::Damaged);
            output::verified(&event, look)?;
        }
    }
    match damaged {
        0 => Ok(()),
        _ if repair => {
            Err(Error::internal(format!("{damaged} layers were damaged and given up; pull the images named above again")))
        }
        _ => Err(Error::internal(format!("{damaged} layers are damaged; `windlass image verify --repair` gives them up"))),
    }
}
