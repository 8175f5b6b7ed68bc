//! Entries for systemd's journal in its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): a datagram of fields. What an event is
//! about becomes fields that `journalctl` can select by: `POD_ID`, `POD`, `NAMESPACE`, `CONTAINER_ID`, `CONTAINER_NAME`, `ERROR` and so on,
//! those of the spans that it happened in among them.
//!
//! An own few lines, because tracing-journald gives a span's fields other names than an event's, so that one pod's entries could not be selected by
//! one field. Never waits: an entry that the journal has no room for is dropped and counted.

use super::names;
use crate::telemetry;
use std::{
    fmt::{self, Write as _},
    io::{self, Write as _},
    os::unix::net::UnixDatagram,
};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

const SOCKET: &str = "/run/systemd/journal/socket";
/// What is longer is cut, and what is more is left out: an entry must fit a datagram.
const VALUE_LIMIT_BYTES: usize = 32 << 10;
const ENTRY_LIMIT_BYTES: usize = 128 << 10;

pub(super) struct Journal {
    socket: UnixDatagram,
}

/// Fields in the order in which they came.
#[derive(Default)]
struct Fields(Vec<(&'static str, String)>);

impl Fields {
    fn set(&mut self, name: &'static str, value: String) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field.name(), value.to_owned());
    }
}

impl Journal {
    pub(super) fn open() -> io::Result<Journal> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        // Fails where no journal listens.
        UnixDatagram::unbound()?.connect(SOCKET)?;
        Ok(Journal { socket })
    }

    fn send(&self, entry: &[u8], message: &str) {
        match self.socket.send_to(entry, SOCKET) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => telemetry::LOG_ENTRIES_DROPPED.add(1),
            // Without a journal, standard error leads nowhere either, but costs nothing to try.
            Err(error) => drop(writeln!(io::stderr(), "{message} (journal: {error})")),
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Journal {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(outer) = span.extensions().get::<Fields>() {
                outer.0.iter().for_each(|(name, value)| fields.set(name, value.clone()));
            }
        }
        event.record(&mut fields);
        let metadata = event.metadata();
        let place = metadata.file().zip(metadata.line());
        let (entry, message) = entry(*metadata.level(), place, fields);
        self.send(&entry, &message);
    }
}

/// syslog(3)'s priorities.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// The datagram, and its message.
fn entry(level: Level, place: Option<(&str, u32)>, fields: Fields) -> (Vec<u8>, String) {
    let mut entry = Vec::with_capacity(512);
    put(&mut entry, "PRIORITY", &priority(level).to_string());
    put(&mut entry, "SYSLOG_IDENTIFIER", "windlass");
    if let Some((file, line)) = place {
        put(&mut entry, "CODE_FILE", file);
        put(&mut entry, "CODE_LINE", &line.to_string());
    }
    let (mut message, mut error) = (String::new(), String::new());
    for (name, value) in &fields.0 {
        match *name {
            "message" => message.clone_from(value),
            "error" => error.clone_from(value),
            _ => {}
        }
    }
    // A reader of messages alone must learn the cause.
    if !error.is_empty() {
        let _ = write!(message, ": {error}");
    }
    put(&mut entry, "MESSAGE", &message);
    let mut named = Vec::new();
    for (name, value) in fields.0.into_iter().filter(|(name, _)| *name != "message") {
        let field = match name {
            "pod" => "POD_ID".to_owned(),
            "container" => "CONTAINER_ID".to_owned(),
            other => field_name(other),
        };
        put(&mut entry, &field, &value);
        if matches!(name, "pod" | "container") {
            named.extend(names::of(&value));
        }
    }
    named.iter().for_each(|(name, value)| put(&mut entry, &field_name(name), value));
    (entry, message)
}

/// Letters, digits and underscores; a leading underscore is the journal's own.
fn field_name(name: &str) -> String {
    let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_uppercase() } else { '_' };
    name.chars().map(plain).collect::<String>().trim_start_matches(|first: char| !first.is_ascii_alphabetic()).to_owned()
}

/// One field: in one line, or with its length where the value has a newline.
fn put(entry: &mut Vec<u8>, name: &str, value: &str) {
    let value = value.get(..value.floor_char_boundary(VALUE_LIMIT_BYTES)).unwrap_or_default();
    if name.is_empty() || entry.len() + name.len() + value.len() > ENTRY_LIMIT_BYTES {
        return;
    }
    entry.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        entry.push(b'\n');
        entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        entry.push(b'=');
    }
    entry.extend_from_slice(value.as_bytes());
    entry.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_fields_that_are_selected_by() {
        names::keep();
        let _pod = names::learn("journal-pod", || vec![("namespace", "default".into()), ("pod", "web".into())]);
        let fields = vec![("message", "gone".into()), ("pod", "journal-pod".into()), ("error", "no\nroom".into())];
        let (entry, message) = entry(Level::WARN, Some(("a.rs", 7)), Fields(fields));
        assert_eq!(message, "gone: no\nroom");
        let mut expected =
            b"PRIORITY=4\nSYSLOG_IDENTIFIER=windlass\nCODE_FILE=a.rs\nCODE_LINE=7\nMESSAGE\n\x0d\0\0\0\0\0\0\0gone: no\nroom\n"
                .to_vec();
        expected.extend_from_slice(b"POD_ID=journal-pod\nERROR\n\x07\0\0\0\0\0\0\0no\nroom\nNAMESPACE=default\nPOD=web\n");
        assert_eq!(String::from_utf8_lossy(&entry), String::from_utf8_lossy(&expected));
    }

    #[test]
    fn names_of_fields_are_the_journals() {
        for (name, expected) in [("elapsed_ms", "ELAPSED_MS"), ("_pid", "PID"), ("a.b-c", "A_B_C"), ("9x", "X"), ("_", "")] {
            assert_eq!(field_name(name), expected);
        }
    }

    #[test]
    fn an_entry_fits_a_datagram() {
        let fields = ["a", "b", "c", "d", "e", "f"].map(|name| (name, "é".repeat(VALUE_LIMIT_BYTES)));
        let (entry, _) = entry(Level::ERROR, None, Fields(fields.into()));
        assert!(entry.len() <= ENTRY_LIMIT_BYTES + 64, "{}", entry.len());
    }

    #[test]
    fn inner_fields_go_over_outer_ones() {
        let mut fields = Fields::default();
        fields.set("pod", "outer".into());
        fields.set("name", "x".into());
        fields.set("pod", "inner".into());
        assert_eq!(fields.0, [("pod", "inner".to_owned()), ("name", "x".to_owned())]);
    }
}
