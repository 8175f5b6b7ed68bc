//! Turns the bytes of one stream into entries of the log. Pure: the same bytes give the same entries, however they are cut.

use super::time::rfc3339_nano;

/// Longest content of one entry. A longer line is split into entries tagged P, of which the last is tagged F.
pub const LINE_LIMIT_BYTES: usize = 16 * 1024;

/// Capacity that an empty buffer may keep between lines.
const KEPT_BYTES: usize = 1024;

/// Which of the two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; with a terminal everything.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Stream::Stdout => b"stdout",
            Stream::Stderr => b"stderr",
        }
    }
}

/// The unfinished line of one stream.
#[derive(Debug)]
pub(super) struct Splitter {
    stream: Stream,
    /// At most [`LINE_LIMIT_BYTES`]; allocated while a line is unfinished.
    pending: Vec<u8>,
}

impl Splitter {
    pub(super) fn new(stream: Stream) -> Splitter {
        Splitter { stream, pending: Vec::new() }
    }

    /// Appends every entry that `bytes` completes to `out`.
    pub(super) fn push(&mut self, mut bytes: &[u8], epoch_ns: i64, out: &mut Vec<u8>) {
        let time = rfc3339_nano(epoch_ns);
        while !bytes.is_empty() {
            let room = LINE_LIMIT_BYTES - self.pending.len();
            // One byte more than fits is looked at: a newline there ends the line, anything else makes it a part.
            let window = bytes.get(..room + 1).unwrap_or(bytes);
            if let Some(at) = window.iter().position(|byte| *byte == b'\n') {
                self.finish(&window[..at], b'F', &time, out);
                bytes = &bytes[at + 1..];
            } else if window.len() > room {
                self.finish(&window[..room], b'P', &time, out);
                bytes = &bytes[room..];
            } else {
                self.pending.extend_from_slice(window);
                return;
            }
        }
    }

    /// Appends what is left of an unterminated last line, tagged P.
    pub(super) fn end(&mut self, epoch_ns: i64, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.finish(&[], b'P', &rfc3339_nano(epoch_ns), out);
        }
    }

    fn finish(&mut self, rest: &[u8], tag: u8, time: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(time);
        out.push(b' ');
        out.extend_from_slice(self.stream.name());
        out.extend_from_slice(&[b' ', tag, b' ']);
        let content = out.len();
        out.extend_from_slice(&self.pending);
        out.extend_from_slice(rest);
        if tag == b'F' && out.len() > content && out.last() == Some(&b'\r') {
            out.pop();
        }
        out.push(b'\n');
        self.pending.clear();
        self.pending.shrink_to(KEPT_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tag and content of each entry; every entry must be well formed.
    fn entries(out: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let lines = out.split_inclusive(|byte| *byte == b'\n');
        lines
            .map(|line| {
                assert_eq!(&line[..38], b"1970-01-01T00:00:00.000000007Z stdout ", "{}", String::from_utf8_lossy(line));
                assert_eq!((line[39], line.last()), (b' ', Some(&b'\n')));
                (line[38], line[40..line.len() - 1].to_vec())
            })
            .collect()
    }

    fn split(chunks: &[&[u8]]) -> Vec<(u8, Vec<u8>)> {
        let mut splitter = Splitter::new(Stream::Stdout);
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, 7, &mut out);
        }
        splitter.end(7, &mut out);
        entries(&out)
    }

    #[test]
    fn lines_carriage_returns_and_an_unterminated_end() {
        let expected = [(b'F', "a"), (b'F', ""), (b'F', "b"), (b'F', "\r"), (b'P', "c\r")]
            .map(|(tag, text)| (tag, text.as_bytes().to_vec()));
        assert_eq!(split(&[b"a\n\nb\r\n\r\r\nc\r"]), expected);
    }

    #[test]
    fn lines_split_at_the_limit() {
        for (length, expected) in [
            (LINE_LIMIT_BYTES - 1, vec![(b'F', LINE_LIMIT_BYTES - 1)]),
            (LINE_LIMIT_BYTES, vec![(b'F', LINE_LIMIT_BYTES)]),
            (LINE_LIMIT_BYTES + 1, vec![(b'P', LINE_LIMIT_BYTES), (b'F', 1)]),
            (2 * LINE_LIMIT_BYTES, vec![(b'P', LINE_LIMIT_BYTES), (b'F', LINE_LIMIT_BYTES)]),
        ] {
            let mut line = vec![b'x'; length];
            line.push(b'\n');
            let lengths: Vec<_> = split(&[&line]).into_iter().map(|(tag, content)| (tag, content.len())).collect();
            assert_eq!(lengths, expected, "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn chunks_do_not_matter(
            lines in prop::collection::vec((prop_oneof![0usize..80, 16_380usize..16_390, 0usize..40_000], any::<u8>()), 0..6),
            cuts in prop::collection::vec(1usize..20_000, 1..12),
            terminated: bool,
        ) {
            let mut bytes = Vec::new();
            for (length, fill) in lines {
                bytes.extend(std::iter::repeat_n(if fill == b'\n' { b'\r' } else { fill }, length));
                bytes.push(b'\n');
            }
            if !terminated {
                bytes.pop();
            }
            let mut chunks = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (chunk, tail) = rest.split_at((*cut).min(rest.len()));
                chunks.push(chunk);
                rest = tail;
            }
            prop_assert_eq!(split(&chunks), split(&[&bytes]));
        }
    }
}
