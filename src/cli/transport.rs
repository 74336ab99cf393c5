//! How commands reach a running service: where it is, and who is calling.

use std::time::Duration;

use anyhow::{Context as _, bail};
use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Client, Url};
use zeroize::Zeroizing;

use crate::config::Variables;
use crate::tenant::TenantId;

/// How long the service may take to be connected to.
const CONNECT_TIME_MAX: Duration = Duration::from_mins(1);

/// A service, and the credential for it.
pub(super) struct Transport {
    pub(super) client: Client,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
}

impl Transport {
    /// The service at this URL. Refuses to send a credential over a network without TLS, unless that is what is wanted.
    pub(super) fn new(
        url: &str,
        tenant: Option<&TenantId>,
        unprotected_http: bool,
        variables: &Variables,
    ) -> anyhow::Result<Self> {
        let url: Url = url.parse().with_context(|| format!("{url:?} is not a URL"))?;
        let loopback = match url.host_str() {
            Some(host) => host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(is_loopback),
            None => bail!("{url} names no host"),
        };
        match url.scheme() {
            "https" => {}
            "http" if loopback || unprotected_http => {}
            "http" => bail!(
                "{url} has no TLS: your API key and plaintext would cross the network unprotected. Use https, or say \
                 --unprotected-http"
            ),
            other => bail!("{other}: is no scheme of a keyfold service: use https"),
        }
        let api_key = variables.value("KEYFOLD_API_KEY").context("set KEYFOLD_API_KEY to your API key")?;
        let mut headers = HeaderMap::new();
        let bearer = Zeroizing::new(format!("Bearer {api_key}"));
        let mut bearer = HeaderValue::from_str(&bearer).context("KEYFOLD_API_KEY is not an API key")?;
        bearer.set_sensitive(true);
        headers.insert("authorization", bearer);
        if let Some(tenant) = tenant {
            headers.insert("keyfold-tenant", HeaderValue::from_str(tenant.as_str())?);
        }
        crate::http::server::use_crypto_provider();
        let client = Client::builder()
            // The credential is for this service, and for nobody to whom it may point.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIME_MAX)
            .build()?;
        Ok(Self { client, url, headers })
    }
}

fn is_loopback(address: std::net::IpAddr) -> bool {
    address.is_loopback()
}
