//! The description of the API, made from the code: every operation with each code that it can fail with.

mod export;

use std::collections::BTreeMap;

use utoipa::{
    PartialSchema,
    openapi::{
        Components, ContentBuilder, HeaderBuilder, Info, ObjectBuilder, OpenApi, PathItem, Ref, RefOr,
        Response, ResponseBuilder, Schema,
        header::Header,
        path::Operation,
        schema::Type,
        security::{Http, HttpAuthScheme, SecurityScheme},
    },
};

use crate::{
    error::{self, Problem, ProblemDocument},
    idempotency::KEY_HEADER,
    market, notification,
    release::Release,
    service, stream, trade, user,
};

/// What operations refuse for reasons of their own. What follows from their shape is in [`of_shape`].
const REFUSALS: &[(&str, &str, &[&str])] = &[
    ("get", "/version", &[]),
    ("post", "/register", &["lane_refused", "too_many_requests"]),
    ("post", "/login", &["wrong_credentials", "too_many_requests"]),
    ("post", "/token/refresh", &["invalid_refresh_token"]),
    ("post", "/logout", &[]),
    ("get", "/profile", &[]),
    ("patch", "/profile", &[]),
    ("post", "/password", &["wrong_credentials", "too_many_requests"]),
    ("get", "/user/export", &["too_many_requests"]),
    ("delete", "/user", &["accounts_not_empty"]),
    ("delete", "/lane", &["lane_refused"]),
    ("get", "/.well-known/jwks.json", &[]),
    (
        "post",
        "/account/add",
        &["unknown_currency", "account_exists", "account_limit"],
    ),
    (
        "post",
        "/account/update",
        &["account_not_found", "account_exists"],
    ),
    (
        "post",
        "/account/delete",
        &["account_not_found", "account_not_empty", "account_in_use"],
    ),
    ("get", "/account/list", &[]),
    (
        "post",
        "/account/deposit",
        &[
            "forbidden",
            "account_not_found",
            "amount_increment",
            "balance_limit",
            "idempotency_key_reused",
        ],
    ),
    (
        "post",
        "/account/withdraw",
        &[
            "account_not_found",
            "account_frozen",
            "amount_increment",
            "insufficient_funds",
            "idempotency_key_reused",
        ],
    ),
    ("get", "/products", &[]),
    (
        "post",
        "/trade/add",
        &[
            "unknown_product",
            "product_halted",
            "size_too_small",
            "size_increment",
            "price_increment",
            "value_too_large",
            "account_not_found",
            "account_frozen",
            "currency_mismatch",
            "insufficient_funds",
            "balance_limit",
            "open_order_limit",
            "idempotency_key_reused",
            "too_many_requests",
        ],
    ),
    ("post", "/trade/cancel", &["order_not_found", "order_filled"]),
    ("get", "/trade/getTradeByAccount", &["account_not_found"]),
    ("get", "/book", &["unknown_product"]),
    (
        "get",
        "/market/ticker",
        &["unauthenticated", "not_found", "unknown_product"],
    ),
    ("get", "/market/candles", &["unauthenticated", "unknown_product"]),
    ("get", "/market/trades", &["unauthenticated", "unknown_product"]),
    ("get", "/notifications", &[]),
    ("get", "/notifications/stream", &["too_many_requests"]),
    ("post", "/notifications/read", &[]),
    ("post", "/notifications/{id}/read", &["not_found"]),
];

/// The OpenAPI document of all services of a release.
pub fn document(release: Release) -> OpenApi {
    let services = [
        service::routes().into_openapi(),
        user::routes().into_openapi(),
        trade::routes().into_openapi(),
        market::routes().into_openapi(),
        notification::routes().into_openapi(),
        stream::routes().into_openapi(),
    ];
    let problems = [error::PROBLEMS, user::PROBLEMS, trade::PROBLEMS].concat();

    let mut document = OpenApi::default();
    for service in services {
        document.merge(service);
    }
    document.info = Info::new("exchange", release.version);
    document.info.description = Some(description(&problems));
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in operations(item) {
            let own = REFUSALS
                .iter()
                .find(|refusal| (refusal.0, refusal.1) == (method, path));
            let own = own.map_or(&[][..], |(_, _, codes)| codes);
            let own = problems.iter().filter(|problem| own.contains(&problem.code));
            let failures = failures(of_shape(operation).iter().chain(own));
            operation.responses.responses.extend(failures);
            if takes_a_key(operation) {
                let responses = &mut operation.responses.responses;
                if let Some(RefOr::T(created)) = responses.get_mut("201") {
                    let hit = header(
                        Type::Boolean,
                        "`true` if this is the first answer once more, and nothing has happened again; else absent",
                    );
                    created.headers.insert("Idempotency-Hit".to_owned(), hit);
                }
            }
        }
    }
    let export = document.paths.paths.get_mut("/user/export");
    if let Some(export) = export.and_then(|item| item.get.as_mut())
        && let Some(RefOr::T(exported)) = export.responses.responses.get_mut("200")
    {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Export")));
        exported
            .content
            .insert("application/json".to_owned(), content.build().into());
    }

    let components = document.components.get_or_insert_with(Components::default);
    components.add_security_scheme(
        "access_token",
        SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)),
    );
    let mut schema = ProblemDocument::schema();
    if let RefOr::T(Schema::Object(problem)) = &mut schema
        && let Some(RefOr::T(Schema::Object(code))) = problem.properties.get_mut("code")
    {
        code.enum_values = Some(problems.iter().map(|problem| problem.code.into()).collect());
    }
    components.schemas.insert("ProblemDocument".to_owned(), schema);
    components
        .schemas
        .insert("Export".to_owned(), export::schema(release).into());
    if !release.has_freezes
        && let Some(RefOr::T(Schema::Object(account))) = components.schemas.get_mut("Account")
    {
        account.properties.remove("frozen_at");
    }
    document
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (&'static str, &mut Operation)> {
    let operations = [
        ("get", &mut item.get),
        ("post", &mut item.post),
        ("patch", &mut item.patch),
        ("delete", &mut item.delete),
    ];
    operations
        .into_iter()
        .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// Whether a request may carry the key by which a repetition is known.
fn takes_a_key(operation: &Operation) -> bool {
    let parameters = operation.parameters.iter().flatten();
    parameters.into_iter().any(|parameter| match parameter {
        RefOr::T(parameter) => parameter.name.eq_ignore_ascii_case(KEY_HEADER),
        RefOr::Ref(_) => false,
    })
}

fn header(kind: Type, meaning: &str) -> RefOr<Header> {
    let header = HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(kind)))
        .description(Some(meaning));
    RefOr::T(header.build())
}

/// What every operation of this shape can fail with.
fn of_shape(operation: &Operation) -> Vec<Problem> {
    let mut problems = vec![error::INTERNAL, error::UNAVAILABLE];
    if operation.security.is_some() {
        problems.push(error::UNAUTHENTICATED);
    }
    if operation.parameters.is_some() {
        problems.push(error::INVALID_PARAMETER);
    }
    if operation.request_body.is_some() {
        problems.extend([
            error::INVALID_BODY,
            error::INVALID_FIELD,
            error::REQUEST_TIMEOUT,
            error::BODY_TOO_LARGE,
            error::UNSUPPORTED_MEDIA_TYPE,
        ]);
    }
    problems
}

/// A response for each status, which says the codes that come with it.
fn failures<'a>(problems: impl Iterator<Item = &'a Problem>) -> BTreeMap<String, RefOr<Response>> {
    let mut codes: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for problem in problems {
        let said = format!("`{}`: {}", problem.code, problem.title);
        codes
            .entry(problem.status.as_str().to_owned())
            .or_default()
            .push(said);
    }
    let response = |status: &str, said: &[String]| {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("ProblemDocument")));
        let mut response = ResponseBuilder::new()
            .description(said.join("\n\n"))
            .content("application/problem+json", content.build())
            .build();
        if ["429", "503"].contains(&status) {
            let seconds = header(
                Type::Integer,
                "Seconds after which the same request may be sent again",
            );
            response.headers.insert("Retry-After".to_owned(), seconds);
        }
        response
    };
    let responses = codes.into_iter().map(|(status, said)| {
        let response = RefOr::T(response(&status, &said));
        (status, response)
    });
    responses.collect()
}

fn description(problems: &[Problem]) -> String {
    let rows = problems.iter().map(|problem| {
        format!(
            "| `{}` | {} | {} |\n",
            problem.code,
            problem.status.as_u16(),
            problem.title
        )
    });
    let rows: String = rows.collect();
    format!(
        "Every response names the stack that answered in `x-exchange-stack`. Failures are problem documents (RFC 9457) \
         with a stable `code`; 429 and 503 come with `Retry-After`:\n\n| code | status | meaning |\n|---|---|---|\n{rows}"
    )
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use serde_json::Value;

    use super::*;
    use crate::release::{V1, V2};

    #[test]
    fn the_descriptions_are_current() {
        for (release, file, target) in [
            (V1, "openapi.json", "exchange"),
            (V2, "openapi-2.json", "exchange-2"),
        ] {
            let document = document(release).to_pretty_json().unwrap() + "\n";
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file);
            let committed = std::fs::read_to_string(path).unwrap_or_default();
            assert!(
                document == committed,
                "write it anew: cargo run --bin {target} -- openapi >docs/{file}"
            );
            let parsed: Value = serde_json::from_str(&document).unwrap();
            let references = document.split(r##""$ref": "#"##).skip(1);
            for reference in references.map(|rest| rest.split('"').next().unwrap()) {
                assert!(parsed.pointer(reference).is_some(), "{reference} leads nowhere");
            }
        }
    }

    #[test]
    fn refusals_are_of_operations_and_codes_that_exist() {
        let mut document = document(V2);
        let routes: BTreeSet<(&str, String)> = document
            .paths
            .paths
            .iter_mut()
            .flat_map(|(path, item)| operations(item).map(|(method, _)| (method, path.clone())))
            .collect();
        let ruled = REFUSALS
            .iter()
            .map(|(method, path, _)| (*method, (*path).to_owned()));
        assert_eq!(ruled.collect::<BTreeSet<_>>(), routes);
        let problems = [error::PROBLEMS, user::PROBLEMS, trade::PROBLEMS].concat();
        for code in REFUSALS.iter().flat_map(|(_, _, codes)| *codes) {
            assert!(problems.iter().any(|problem| problem.code == *code), "{code}");
        }
    }
}
