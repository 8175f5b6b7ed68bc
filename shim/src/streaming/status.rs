//! How an ending is told on the error stream: a v1.Status of the Kubernetes API as JSON since protocol version 4, plain text before.

use super::session::Ending;
use serde_json::json;

/// The JSON form.
pub(super) fn json_of(ending: &Ending) -> String {
    match ending {
        Ending::Exited(0) | Ending::Detached => json!({ "metadata": {}, "status": "Success" }),
        Ending::Exited(code) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
        }),
        Ending::Failed(error) => json!({
            "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
            "message": format!("Internal error occurred: {}", error.message),
            "details": { "causes": [{ "message": error.message }] },
        }),
    }
    .to_string()
}

/// The text of versions 1 to 3; empty for success.
pub(super) fn text_of(ending: &Ending) -> String {
    match ending {
        Ending::Exited(0) | Ending::Detached => String::new(),
        Ending::Exited(code) => format!("command terminated with non-zero exit code: exit status {code}"),
        Ending::Failed(error) => error.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use serde_json::Value;

    #[test]
    fn endings_are_told_as_client_go_reads_them() {
        let read = |ending| serde_json::from_str::<Value>(&json_of(&ending)).expect("JSON");
        assert_eq!(read(Ending::Exited(0)), json!({ "metadata": {}, "status": "Success" }));
        let failed = read(Ending::Exited(7));
        assert_eq!((&failed["reason"], &failed["details"]["causes"][0]["message"]), (&json!("NonZeroExitCode"), &json!("7")));
        assert_eq!(read(Ending::Failed(Error::invalid("no")))["reason"], "InternalError");
        assert_eq!(text_of(&Ending::Exited(0)), "");
    }
}
