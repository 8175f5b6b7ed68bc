//! TLS of the streaming server, with the certificate of the configuration.

use crate::{
    config::StreamingConfig,
    error::{Error, Result},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::{path::Path, sync::Arc};
use tokio_rustls::{TlsAcceptor, rustls};

/// The acceptor, or none where no certificate is configured. A certificate without a key, or the reverse, is an error.
pub(super) fn acceptor(config: &StreamingConfig) -> Result<Option<TlsAcceptor>> {
    let (certificate, key) = (&config.tls_certificate, &config.tls_key);
    if certificate.as_os_str().is_empty() && key.as_os_str().is_empty() {
        return Ok(None);
    }
    let bad = |field: &str, path: &Path, error: &dyn std::fmt::Display| {
        Error::invalid(format!("streaming.{field} {:?}: {error}", path.display()))
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(|found| found.collect::<std::result::Result<Vec<_>, _>>())
        .map_err(|error| bad("tls_certificate", certificate, &error))?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| bad("tls_key", key, &error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key_der))
        .map_err(|error| bad("tls_key", key, &error))?;
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}
