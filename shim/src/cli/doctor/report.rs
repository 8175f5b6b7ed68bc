//! What was found, and how it is told.

use super::super::output::{line, raw, safe};
use crate::error::Result;
use serde::Serialize;
use std::{io::IsTerminal, process::ExitCode};

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    /// It could not be looked at.
    Unseen,
    /// Something does not work, or will not for long; the rest does.
    Warning,
    /// The daemon does not start, or pods do not run as they should.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Finding {
    area: &'static str,
    verdict: Verdict,
    /// What is so, and what it means.
    says: String,
    /// What to do; empty where nothing is to be done.
    next: String,
}

impl Finding {
    pub(super) fn is_error(&self) -> bool {
        self.verdict == Verdict::Error
    }
}

/// All that was found, in the order of the checks.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    #[serde(skip)]
    area: &'static str,
    pub(super) findings: Vec<Finding>,
}

impl Report {
    /// What is found from now on belongs here.
    pub(super) fn area(&mut self, area: &'static str) {
        self.area = area;
    }

    fn note(&mut self, verdict: Verdict, says: impl Into<String>, next: impl Into<String>) {
        // Names of files, processes and objects stand in it, which others choose.
        let told = |text: String| safe(&text, &[]).into_owned();
        self.findings.push(Finding { area: self.area, verdict, says: told(says.into()), next: told(next.into()) });
    }

    pub(super) fn ok(&mut self, says: impl Into<String>) {
        self.note(Verdict::Ok, says, "");
    }

    pub(super) fn unseen(&mut self, says: impl Into<String>, next: impl Into<String>) {
        self.note(Verdict::Unseen, says, next);
    }

    pub(super) fn warning(&mut self, says: impl Into<String>, next: impl Into<String>) {
        self.note(Verdict::Warning, says, next);
    }

    pub(super) fn error(&mut self, says: impl Into<String>, next: impl Into<String>) {
        self.note(Verdict::Error, says, next);
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.findings.iter().filter(|finding| finding.verdict == verdict).count()
    }

    /// 0: nothing is wrong; 1: there are warnings; 2: there are errors; 3: nothing wrong was seen, and not all was.
    pub(super) fn exit_code(&self) -> ExitCode {
        match (self.count(Verdict::Error), self.count(Verdict::Warning), self.count(Verdict::Unseen)) {
            (0, 0, 0) => ExitCode::SUCCESS,
            (0, 0, _) => ExitCode::from(3),
            (0, ..) => ExitCode::from(1),
            _ => ExitCode::from(2),
        }
    }

    /// Leaves what is not well.
    pub(super) fn only_bad(&mut self) {
        self.findings.retain(|finding| finding.verdict != Verdict::Ok);
    }

    /// For people, by areas; with colours on a terminal, unless NO_COLOR is set.
    pub(super) fn print(&self) -> Result<()> {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let mut area = "";
        for finding in &self.findings {
            if finding.area != area {
                area = finding.area;
                line(area)?;
            }
            raw(format_args!("  {}  {}", word(finding.verdict, colours), finding.says))?;
            if !finding.next.is_empty() {
                line(format_args!("           -> {}", finding.next))?;
            }
        }
        let number = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        let (errors, warnings, unseen) = (self.count(Verdict::Error), self.count(Verdict::Warning), self.count(Verdict::Unseen));
        let unseen = if unseen == 0 { String::new() } else { format!(", {unseen} not seen") };
        line(format_args!("{}, {}{unseen}", number(errors, "error"), number(warnings, "warning")))
    }
}

/// The verdict's word, eight wide.
fn word(verdict: Verdict, colours: bool) -> String {
    let (word, colour) = match verdict {
        Verdict::Ok => ("OK", 32),
        Verdict::Unseen => ("not seen", 36),
        Verdict::Warning => ("warning", 33),
        Verdict::Error => ("ERROR", 31),
    };
    if colours { format!("\x1b[{colour}m{word:<8}\x1b[0m") } else { format!("{word:<8}") }
}
