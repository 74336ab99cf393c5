//! As much of STS as assuming a role takes: AssumeRole and GetCallerIdentity, in the query protocol.

use std::collections::HashMap;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, StatusCode};
use uuid::Uuid;

use super::wire::WireControl;
use super::{Shared, faulty};
use crate::calls::Arrival;
use crate::directory::{Caller, new_access_key, session_arn};
use crate::engine::Session;
use crate::error::KmsError;

type Form = HashMap<String, String>;

pub(super) fn is_form(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|value| value.starts_with("application/x-www-form-urlencoded"))
}

pub(super) async fn serve(shared: &Shared, wire: &WireControl, headers: &HeaderMap, body: &[u8]) -> Response {
    let form = parse_form(body);
    let operation = form.get("Action").cloned().unwrap_or_default();
    let caller = match shared.engine.identify(headers, "sts") {
        Ok(caller) => caller,
        Err(error) => return render(&operation, Err(error)),
    };
    let arrival = Arrival {
        operation: operation.clone(),
        region: caller.region.clone(),
        account: caller.account.clone(),
        principal: caller.principal.clone(),
        ..Arrival::default()
    };
    let call = || match operation.as_str() {
        "AssumeRole" => assume_role(shared, &caller, &form),
        "GetCallerIdentity" => Ok(caller_identity(&caller)),
        _ => Err(KmsError::unknown_operation()),
    };
    faulty::run(shared, wire, arrival, call, |result| render(&operation, result)).await
}

fn assume_role(shared: &Shared, caller: &Caller, form: &Form) -> Result<String, KmsError> {
    let required = |name: &str, parameter| form.get(name).ok_or_else(|| KmsError::missing(parameter));
    let arn = required("RoleArn", "roleArn")?;
    let name = required("RoleSessionName", "roleSessionName")?;
    let seconds: u64 = match form.get("DurationSeconds").map(|text| text.parse()) {
        None => 3600,
        Some(Ok(seconds @ 900..=43_200)) => seconds,
        Some(_) => {
            let constraint = "have value between 900 and 43200";
            return Err(KmsError::constraint("durationSeconds", "", constraint));
        }
    };
    let now = shared.engine.clock.now();
    shared.engine.assume_role(|directory, state| {
        let role = directory.role(arn).filter(|role| {
            let trusts = |who: &String| *who == caller.account || caller.names.contains(who);
            let is_trusted = role.trusted.is_empty() || role.trusted.iter().any(trusts);
            let id_fits = role.external_id.is_none() || role.external_id.as_ref() == form.get("ExternalId");
            is_trusted && id_fits
        });
        // AWS does not tell a missing role, an untrusted caller and a wrong external id apart.
        let Some(role) = role else {
            let who = &caller.principal;
            let message = format!("User: {who} is not authorized to perform: sts:AssumeRole on resource: {arn}");
            return Err(KmsError::access_denied(message));
        };
        let (id, secret, token) = (random_uuid()?, random_uuid()?, random_uuid()?);
        let access_key = new_access_key(id.as_bytes());
        let session = Session {
            token: token.simple().to_string(),
            role_arn: arn.clone(),
            name: name.clone(),
            expires: now.plus(Duration::from_secs(seconds)),
        };
        let answer = format!(
            "<AssumedRoleUser><AssumedRoleId>AROAEMULATOR:{name}</AssumedRoleId><Arn>{user}</Arn></AssumedRoleUser>\
             <Credentials><AccessKeyId>{access_key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>\
             <SessionToken>{token}</SessionToken><Expiration>{expires}</Expiration></Credentials>",
            name = escape(name),
            user = escape(&session_arn(arn, &role.account, name)),
            secret = secret.simple(),
            token = session.token,
            expires = session.expires.rfc3339(),
        );
        state.sessions.insert(access_key, session);
        Ok(answer)
    })
}

fn caller_identity(caller: &Caller) -> String {
    format!(
        "<Arn>{}</Arn><UserId>EMULATOR</UserId><Account>{}</Account>",
        escape(&caller.principal),
        caller.account
    )
}

fn random_uuid() -> Result<Uuid, KmsError> {
    let mut bytes = [0; 16];
    crate::blob::random(&mut bytes)?;
    Ok(Uuid::from_bytes(bytes))
}

/// STS has its own names for some errors, and other statuses.
fn render(operation: &str, result: Result<String, KmsError>) -> Response {
    let id = Uuid::new_v4();
    let namespace = "https://sts.amazonaws.com/doc/2011-06-15/";
    let (status, body) = match result {
        Ok(answer) => (
            StatusCode::OK,
            format!(
                "<{operation}Response xmlns=\"{namespace}\"><{operation}Result>{answer}</{operation}Result>\
                 <ResponseMetadata><RequestId>{id}</RequestId></ResponseMetadata></{operation}Response>"
            ),
        ),
        Err(error) => {
            let (status, code) = match error.code() {
                "AccessDeniedException" => (403, "AccessDenied"),
                "UnrecognizedClientException" => (403, "InvalidClientTokenId"),
                "ExpiredTokenException" => (403, "ExpiredToken"),
                "MissingAuthenticationTokenException" => (403, "MissingAuthenticationToken"),
                "UnknownOperationException" => (400, "InvalidAction"),
                "ValidationException" => (400, "ValidationError"),
                "ThrottlingException" => (400, "Throttling"),
                "ServiceUnavailableException" => (503, "ServiceUnavailable"),
                _ if error.status() >= 500 => (500, "InternalFailure"),
                code => (error.status(), code),
            };
            let message = escape(error.message().unwrap_or_default());
            let body = format!(
                "<ErrorResponse xmlns=\"{namespace}\"><Error><Type>Sender</Type><Code>{code}</Code>\
                 <Message>{message}</Message></Error><RequestId>{id}</RequestId></ErrorResponse>"
            );
            (StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), body)
        }
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/xml"));
    response
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn parse_form(body: &[u8]) -> Form {
    let body = String::from_utf8_lossy(body);
    let pairs = body.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (percent_decode(name), percent_decode(value))).collect()
}

fn percent_decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = || u8::from_str_radix(std::str::from_utf8(after.get(..2)?).ok()?, 16).ok();
        rest = after;
        match byte {
            b'+' => out.push(b' '),
            b'%' => match hex() {
                Some(decoded) => {
                    out.push(decoded);
                    rest = &after[2..];
                }
                None => out.push(b'%'),
            },
            byte => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let form = parse_form(b"Action=AssumeRole&RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fx&A=b+c%2");
        assert_eq!(form["Action"], "AssumeRole");
        assert_eq!(form["RoleArn"], "arn:aws:iam::1:role/x");
        assert_eq!(form["A"], "b c%2");
    }
}
