//! `windlass logs`: what a container wrote, from its log in the CRI's form: time, stream, `F` or `P` for a whole line or a part of one, text.

use super::{
    Place,
    client::Client,
    output::{failed_write, safe},
};
use crate::error::{Error, Result};
use clap::Args;
use std::{
    fs::File,
    io::{self, BufRead, BufReader, IsTerminal, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use windlass_proto::cri::ContainerState;

/// How often a log that is followed is looked at.
const POLL: Duration = Duration::from_millis(200);
/// How often it is asked whether its container still runs.
const ASK_EVERY: u32 = 5;
/// Read at once when the last lines are looked for.
const BLOCK_BYTES: u64 = 64 << 10;
/// Longest line that is shown in one piece. The runtime cuts at 16 KiB.
const LINE_MAX_BYTES: u64 = 1 << 20;

/// `windlass logs ...`
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: Place,
    /// Beginning of an id, NAMESPACE/POD/CONTAINER, or a pod with one container
    container: String,
    /// Go on with what it writes, until it has ended
    #[arg(short, long)]
    follow: bool,
    /// Only the last LINES lines
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
    /// Only lines from then on: 90s, 10m, 2h, 1d ago, or a time as 2026-01-31T12:00:00Z
    #[arg(long, value_name = "WHEN", value_parser = moment)]
    since: Option<OffsetDateTime>,
    /// The time before each line
    #[arg(short, long)]
    timestamps: bool,
    /// As it was written on a terminal too, where control characters are else shown by their numbers
    #[arg(long)]
    raw: bool,
}

/// A moment: how long ago, or when.
fn moment(word: &str) -> std::result::Result<OffsetDateTime, String> {
    let ago = word.char_indices().next_back().and_then(|(at, unit)| {
        let number: u32 = word.get(..at)?.parse().ok()?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return None,
        };
        Some(Duration::from_secs(u64::from(number) * seconds))
    });
    match ago {
        Some(ago) => {
            OffsetDateTime::now_utc().checked_sub(ago.try_into().unwrap_or_default()).ok_or_else(|| "too long ago".into())
        }
        None => {
            OffsetDateTime::parse(word, &Rfc3339).map_err(|_| "write 90s, 10m, 2h, 1d, or a time as 2026-01-31T12:00:00Z".into())
        }
    }
}

/// Runs the command to its end.
pub(super) async fn run(options: Options) -> Result<()> {
    let (_, mut client) = Client::of(options.place.clone()).await?;
    let container = client.find_container(&options.container).await?;
    let (status, _) = client.container(&container.id).await?;
    if status.log_path.is_empty() {
        return Err(Error::precondition(format!("container {} keeps no log: it was created without a log_path", container.id)));
    }
    let path = PathBuf::from(&status.log_path);
    let mut log = Log::open(&path, options.tail)?;
    let mut streams = Streams::new(options.raw);
    let mut polls = 0;
    let mut ended = !options.follow;
    loop {
        log.copy(&options, &mut streams)?;
        if ended {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
        log.follow(&path, &options, &mut streams)?;
        polls += 1;
        if polls % ASK_EVERY == 0 {
            // A daemon that is being restarted says nothing of it.
            ended = match client.container(&container.id).await {
                Ok((status, _)) => status.state() == ContainerState::ContainerExited,
                Err(error) => error.kind == crate::error::Kind::NotFound,
            };
        }
    }
}

/// Where text goes.
trait Sink {
    fn put(&mut self, error_stream: bool, bytes: &[u8]) -> io::Result<()>;
}

/// Each stream to its own.
struct Streams {
    /// Whether each goes to a terminal, which obeys what it is sent.
    shown: [bool; 2],
}

impl Streams {
    fn new(raw: bool) -> Streams {
        Streams { shown: [io::stdout().is_terminal(), io::stderr().is_terminal()].map(|terminal| terminal && !raw) }
    }
}

impl Sink for Streams {
    fn put(&mut self, error_stream: bool, bytes: &[u8]) -> io::Result<()> {
        let text = String::from_utf8_lossy(bytes);
        let text = safe(&text, &['\n', '\t']);
        let bytes = if self.shown[usize::from(error_stream)] { text.as_bytes() } else { bytes };
        if error_stream { io::stderr().write_all(bytes) } else { io::stdout().lock().write_all(bytes) }
    }
}

struct Log {
    file: BufReader<File>,
    inode: u64,
    /// A line that is not whole yet.
    rest: Vec<u8>,
    /// The last text of each stream was a part of a line.
    within: [bool; 2],
    /// The name is another file's, and this one ended within a line when that was seen.
    torn: bool,
}

impl Log {
    fn open(path: &Path, tail: Option<usize>) -> Result<Log> {
        let failed = |error| Error::io(format_args!("open log {}", path.display()), error);
        let mut file = File::open(path).map_err(failed)?;
        let inode = file.metadata().map_err(failed)?.ino();
        let start = tail.map_or(Ok(0), |lines| last_lines(&mut file, lines)).map_err(failed)?;
        file.seek(SeekFrom::Start(start)).map_err(failed)?;
        Ok(Log { file: BufReader::new(file), inode, rest: Vec::new(), within: [false; 2], torn: false })
    }

    /// Goes on with the file that has the name now, where the log was rotated: what came into the old one since the last look is copied
    /// first. A line that is not whole then is waited for until the next look, and shown as it is.
    fn follow(&mut self, path: &Path, options: &Options, to: &mut dyn Sink) -> Result<()> {
        let Ok(metadata) = path.metadata() else { return Ok(()) };
        if metadata.ino() == self.inode {
            return Ok(());
        }
        // Opened before the old one is read to its end: whoever writes has gone over to it, or does.
        let next = match Log::open(path, None) {
            Ok(next) => next,
            Err(_) if !path.exists() => return Ok(()),
            Err(error) => return Err(error),
        };
        self.copy(options, to)?;
        if !self.rest.is_empty() {
            if !std::mem::replace(&mut self.torn, true) {
                return Ok(());
            }
            let mut line = std::mem::take(&mut self.rest);
            line.push(b'\n');
            self.line(&line, options, to).map_err(|error| failed_write("write the log", error))?;
        }
        *self = Log { within: self.within, ..next };
        Ok(())
    }

    /// Copies every whole line that is there.
    fn copy(&mut self, options: &Options, to: &mut dyn Sink) -> Result<()> {
        loop {
            let room = LINE_MAX_BYTES.saturating_sub(self.rest.len() as u64);
            let read = (&mut self.file).take(room).read_until(b'\n', &mut self.rest);
            read.map_err(|error| Error::io("read the log", error))?;
            if !self.rest.ends_with(b"\n") && (self.rest.len() as u64) < LINE_MAX_BYTES {
                return Ok(());
            }
            let line = std::mem::take(&mut self.rest);
            self.line(&line, options, to).map_err(|error| failed_write("write the log", error))?;
        }
    }

    fn line(&mut self, line: &[u8], options: &Options, to: &mut dyn Sink) -> io::Result<()> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (Some(time), Some(stream), Some(tag), Some(text)) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            // No line of ours; shown as it is.
            return to.put(false, line);
        };
        let time = String::from_utf8_lossy(time);
        let before = |since: &OffsetDateTime| OffsetDateTime::parse(&time, &Rfc3339).is_ok_and(|time| time < *since);
        if options.since.as_ref().is_some_and(before) {
            return Ok(());
        }
        let error_stream = stream == b"stderr";
        let within = &mut self.within[usize::from(error_stream)];
        let begins = !*within;
        *within = tag == b"P";
        let mut out = Vec::with_capacity(text.len() + 40);
        if options.timestamps && begins {
            out.extend_from_slice(time.as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(if tag == b"P" { text.strip_suffix(b"\n").unwrap_or(text) } else { text });
        to.put(error_stream, &out)
    }
}

/// Where the last `lines` lines begin.
fn last_lines(file: &mut File, lines: usize) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let (mut end, mut found, mut block) = (length, 0, Vec::new());
    while end > 0 {
        let start = end.saturating_sub(BLOCK_BYTES);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        Read::by_ref(file).take(end - start).read_to_end(&mut block)?;
        for (at, byte) in block.iter().enumerate().rev() {
            let place = start + at as u64;
            if *byte == b'\n' && place + 1 < length {
                found += 1;
                if found == lines {
                    return Ok(place + 1);
                }
            }
        }
        end = start;
    }
    Ok(if lines == 0 { length } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Both(String);

    impl Sink for Both {
        fn put(&mut self, error_stream: bool, bytes: &[u8]) -> io::Result<()> {
            self.0.push_str(if error_stream { "!" } else { "" });
            self.0.push_str(&String::from_utf8_lossy(bytes));
            Ok(())
        }
    }

    const LOG: &str = "2026-01-01T00:00:00.000000001Z stdout F one\n2026-01-01T00:00:01Z stderr P two \n\
                       2026-01-01T00:00:01Z stderr F halves\n2026-01-01T00:00:02Z stdout F \n2026-01-01T00:00:03Z stdout F last\n";

    fn options(since: Option<&str>, tail: Option<usize>, timestamps: bool) -> Options {
        let since = since.map(|word| moment(word).expect("a moment"));
        Options { place: Place::default(), container: String::new(), follow: false, tail, since, timestamps, raw: false }
    }

    fn shown(options: &Options) -> String {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(LOG.as_bytes()).expect("written");
        let mut both = Both(String::new());
        Log::open(file.path(), options.tail).expect("opened").copy(options, &mut both).expect("copied");
        both.0
    }

    #[test]
    fn lines_are_shown_as_they_were_written() {
        assert_eq!(shown(&options(None, None, false)), "one\n!two !halves\n\nlast\n");
        assert_eq!(shown(&options(None, Some(2), false)), "\nlast\n");
        assert_eq!(shown(&options(None, Some(0), false)), "");
        assert_eq!(shown(&options(None, Some(100), false)), shown(&options(None, None, false)));
        assert_eq!(shown(&options(Some("2026-01-01T00:00:02Z"), None, false)), "\nlast\n");
        assert_eq!(
            shown(&options(Some("2026-01-01T00:00:01Z"), None, true)),
            "!2026-01-01T00:00:01Z two !halves\n2026-01-01T00:00:02Z \n2026-01-01T00:00:03Z last\n"
        );
    }

    #[test]
    fn a_log_that_was_rotated_is_followed_and_half_a_line_waits() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("0.log");
        std::fs::write(&path, "2026-01-01T00:00:00Z stdout F on").expect("written");
        let (options, mut both) = (options(None, None, false), Both(String::new()));
        let mut log = Log::open(&path, None).expect("opened");
        log.copy(&options, &mut both).expect("copied");
        assert_eq!(both.0, "");
        let mut file = File::options().append(true).open(&path).expect("opened");
        file.write_all(b"e\n").expect("written");
        std::fs::rename(&path, directory.path().join("0.log.old")).expect("rotated");
        std::fs::write(&path, "2026-01-01T00:00:00Z stdout F two\n").expect("written");
        for _ in 0..2 {
            log.copy(&options, &mut both).expect("copied");
            log.follow(&path, &options, &mut both).expect("followed");
        }
        log.copy(&options, &mut both).expect("copied");
        assert_eq!(both.0, "one\ntwo\n");
    }

    #[test]
    fn lines_that_come_at_a_rotation_are_not_lost_and_a_torn_one_keeps_nothing_waiting() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("0.log");
        std::fs::write(&path, "2026-01-01T00:00:00Z stdout F one\n").expect("written");
        let (options, mut both) = (options(None, None, false), Both(String::new()));
        let mut log = Log::open(&path, None).expect("opened");
        log.copy(&options, &mut both).expect("copied");
        let mut file = File::options().append(true).open(&path).expect("opened");
        file.write_all(b"2026-01-01T00:00:00Z stdout F late\n2026-01-01T00:00:00Z stdout F to").expect("written");
        std::fs::rename(&path, directory.path().join("0.log.old")).expect("rotated");
        std::fs::write(&path, "2026-01-01T00:00:00Z stdout F two\n").expect("written");
        log.follow(&path, &options, &mut both).expect("followed");
        assert_eq!(both.0, "one\nlate\n");
        log.follow(&path, &options, &mut both).expect("followed");
        log.copy(&options, &mut both).expect("copied");
        assert_eq!(both.0, "one\nlate\nto\ntwo\n");
    }

    #[test]
    fn moments() {
        assert!(moment("10m").is_ok_and(|then| (OffsetDateTime::now_utc() - then).whole_seconds() - 600 < 5));
        assert!(moment("2026-01-01T00:00:00+02:00").is_ok());
        for wrong in ["", "m", "10", "10x", "yesterday", "-5m"] {
            assert!(moment(wrong).is_err(), "{wrong:?}");
        }
    }
}
