//! A profile that is ready to load.

use super::cache;
use super::program::compile;
use super::rules::Rules;
use crate::process::{Context, StepError};
use crate::security::capabilities::raise_for_filter;
use crate::sys::seccomp::{Instruction, load};
use oci_spec::runtime::{LinuxSeccompFilterFlag as Flag, Spec};
use std::path::Path;

/// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV has a meaning for listeners only, which there are none of.
fn flag(flag: Flag) -> libc::c_ulong {
    match flag {
        Flag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
        Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        Flag::SeccompFilterFlagWaitKillableRecv => 0,
    }
}

/// A compiled profile.
#[derive(Debug)]
pub struct Filter {
    program: Vec<Instruction>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Compiles `linux.seccomp`, or reads what was compiled of it before from `kept`; `None` when the bundle has none. Errors: an
    /// action or argument that cannot be served, a profile that is too long.
    pub fn of(spec: &Spec, kept: Option<&Path>) -> Result<Option<Filter>, StepError> {
        let Some(profile) = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) else { return Ok(None) };
        let flags = profile.flags().iter().flatten().fold(0, |flags, one| flags | flag(*one));
        let program = match kept.and_then(cache::read) {
            Some(program) => program,
            None => {
                let program = compile(&Rules::new(profile)?)?;
                if let Some(path) = kept {
                    cache::write(path, &program);
                }
                program
            }
        };
        Ok(Some(Filter { program, flags }))
    }

    /// Binds the calling process, and all it becomes, to the filter. Needs no_new_privs or CAP_SYS_ADMIN. Nothing but exec should
    /// follow: the filter may forbid it.
    pub fn load(&self) -> Result<(), StepError> {
        raise_for_filter()?;
        load(&self.program, self.flags).context("load seccomp filter", format_args!("of {} instructions", self.program.len()))
    }
}
