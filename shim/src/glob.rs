//! Patterns of names as containerd's configuration has them (Go's `path.Match`): `*` and `?` stand for anything but `/`, `[a-z]` and `[^a-z]`
//! for one character, and `\` takes a meaning away.

/// One part of a pattern.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    One(char),
    Any,
    Many,
    /// Ranges, and whether the character is none of them.
    Class(Vec<(char, char)>, bool),
}

/// Whether the pattern is of the whole name. A malformed one is of none.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let Some(parts) = parse(pattern) else { return false };
    let name: Vec<char> = name.chars().collect();
    // Where in the name the parts so far may end.
    let mut ends = vec![false; name.len() + 1];
    ends[0] = true;
    for part in parts {
        let mut next = vec![false; name.len() + 1];
        for (at, _) in ends.iter().enumerate().filter(|(_, ends)| **ends) {
            match &part {
                Part::Many => {
                    let length = name.iter().skip(at).take_while(|c| **c != '/').count();
                    next.iter_mut().skip(at).take(length + 1).for_each(|ends| *ends = true);
                }
                part => {
                    if name.get(at).is_some_and(|c| part.is(*c)) {
                        next[at + 1] = true;
                    }
                }
            }
        }
        ends = next;
    }
    ends.last().copied().unwrap_or(false)
}

/// Whether this can be a pattern at all.
pub(crate) fn is_pattern(pattern: &str) -> bool {
    parse(pattern).is_some()
}

impl Part {
    fn is(&self, c: char) -> bool {
        match self {
            Part::One(own) => *own == c,
            Part::Any => c != '/',
            Part::Class(ranges, negated) => c != '/' && ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *negated,
            Part::Many => false,
        }
    }
}

fn parse(pattern: &str) -> Option<Vec<Part>> {
    let mut parts = Vec::new();
    let mut rest = pattern.chars();
    while let Some(c) = rest.next() {
        parts.push(match c {
            '*' => Part::Many,
            '?' => Part::Any,
            '\\' => Part::One(rest.next()?),
            '[' => class(&mut rest)?,
            c => Part::One(c),
        });
    }
    Some(parts)
}

/// What follows a `[`, up to its end.
fn class(rest: &mut std::str::Chars<'_>) -> Option<Part> {
    let negated = rest.as_str().starts_with('^');
    if negated {
        rest.next();
    }
    let mut ranges = Vec::new();
    loop {
        if rest.as_str().starts_with(']') && !ranges.is_empty() {
            rest.next();
            return Some(Part::Class(ranges, negated));
        }
        let low = bound(rest)?;
        let mut high = low;
        if rest.as_str().starts_with('-') {
            rest.next();
            high = bound(rest)?;
        }
        ranges.push((low, high));
    }
}

fn bound(rest: &mut std::str::Chars<'_>) -> Option<char> {
    match rest.next()? {
        '-' | ']' => None,
        '\\' => rest.next(),
        c => Some(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_of_whole_names_and_end_at_slashes() {
        for (pattern, name, expected) in [
            ("run.oci.*", "run.oci.handler", true),
            ("run.oci.*", "run.oci", false),
            ("io.example.*", "io.example.a/b", false),
            ("io.example.*/*", "io.example.a/b", true),
            ("*", "", true),
            ("*", "a/b", false),
            ("*a*b", "xaxaxb", true),
            ("*a*b", "xaxaxbc", false),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("[a-cx]", "x", true),
            ("[^a-c]", "b", false),
            ("[^a-c]", "d", true),
            ("[\\]]", "]", true),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("exact", "exact", true),
            ("exact", "exactly", false),
            ("[", "[", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
        for bad in ["[", "[a", "[]a]", "[-]", "a\\", "[a-]"] {
            assert!(!is_pattern(bad), "{bad}");
        }
    }
}
